"""Celery's part of `espalier bench redis`: all jobs in one by one, all done by two processes, acknowledged late.

Usage: REDIS_URL=redis://… python cycle.py JOBS; prints one line of JSON. `sequential` adds everything first,
`overlapped` adds while the worker works. Each job is written down by the process that did it, in a file of its own.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import celery

PROCESSES = 2
# Messages that a process takes ahead. With 1 it does 12 % fewer jobs a second.
PREFETCH = 64
PAYLOAD = "x" * 300
LIMIT_S = 300

app = celery.Celery("cycle", broker=os.environ["REDIS_URL"])
app.conf.update(
    task_acks_late=True,
    task_ignore_result=True,
    worker_prefetch_multiplier=PREFETCH,
    worker_hijack_root_logger=False,
    broker_connection_retry_on_startup=True,
)
ledger = None


@app.task(name="nothing")
def nothing(n, payload):
    global ledger
    if ledger is None:
        ledger = open(Path(os.environ["CYCLE_FOLDER"]) / f"{os.getpid()}.done", "a", buffering=1)
    ledger.write(f"{n}\n")


def done_in(folder):
    """How often each job was done. A line without its end is still being written."""
    counts = Counter()
    for file in folder.glob("*.done"):
        for line in file.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                counts[int(line)] += 1
    return counts


def bytes_in(folder):
    return sum(file.stat().st_size for file in folder.glob("*.done"))


def start(folder, ready):
    command = [sys.executable, "-m", "celery", "-A", "cycle", "worker", "--pool", "prefork", "--loglevel", "ERROR"]
    command += ["--concurrency", str(PROCESSES), "--without-gossip", "--without-mingle"]
    environment = os.environ | {"CYCLE_FOLDER": str(folder)}
    worker = subprocess.Popen(command, cwd=Path(__file__).parent, env=environment, stdout=subprocess.DEVNULL)
    wait(ready, worker)
    return worker


def wait(ready, worker):
    ends = time.monotonic() + LIMIT_S
    while not ready():
        if worker.poll() is not None or time.monotonic() > ends:
            worker.kill()
            sys.exit("the worker has ended or takes too long")
        time.sleep(0.005)


def add(jobs):
    with app.producer_pool.acquire(block=True) as producer:
        for n in range(jobs):
            nothing.apply_async((n, PAYLOAD), producer=producer)


def left():
    with app.connection_for_read() as connection:
        client = connection.default_channel.client
        return client.llen("celery") + client.hlen("unacked")


def cycle(jobs, overlapped):
    size = sum(len(str(n)) + 1 for n in range(jobs))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        worker = start(folder, lambda: app.control.ping(timeout=0.5)) if overlapped else None
        began = time.monotonic()
        add(jobs)
        added = time.monotonic()
        if worker is None:
            # The start of the worker is nobody's figure: the clock of the work starts at the first job done.
            worker = start(folder, lambda: bytes_in(folder) > 0)
            working = time.monotonic()
            already = sum(done_in(folder).values())
        else:
            working, already = added, 0
        wait(lambda: bytes_in(folder) >= size, worker)
        ended = time.monotonic()
        worker.terminate()
        worker.wait(timeout=60)
        counts = done_in(folder)
        processed = (jobs - already) / (ended - working)
        if overlapped:
            cycle_s = ended - began
        else:
            cycle_s = (added - began) + jobs / processed
        return {
            "add_jobs_per_s": jobs / (added - began),
            "process_jobs_per_s": None if overlapped else processed,
            "cycle_jobs_per_s": jobs / cycle_s,
            "done_once": sum(1 for times in counts.values() if times == 1),
            "completed": sum(counts.values()),
            "left": left(),
        }


def main():
    jobs = int(sys.argv[1])
    sequential = cycle(jobs, overlapped=False)
    overlapped = cycle(jobs, overlapped=True)
    cycles = {"sequential": sequential, "overlapped": overlapped}
    print(json.dumps({"system": f"Celery {celery.__version__}", "jobs": jobs, "cycles": cycles}))


if __name__ == "__main__":
    main()
