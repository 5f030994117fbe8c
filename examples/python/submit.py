#!/usr/bin/env python3
"""Submits rollouts, watches them, and fetches a trace, from Python.

    pip install -r examples/python/requirements.txt
    python examples/python/submit.py --mcp browser --prompt "Open https://example.org. What is its heading?" \
        --contains "Example Domain" --samples 4

The address and the token come from ESPALIER_URL and ESPALIER_TOKEN, or from the `up.json` that `espalier up` writes.
The client code is generated from `proto/` when the script starts; nothing of it is kept in the repository.
"""

import argparse
import importlib
import json
import os
import pathlib
import sys
import tempfile
import time

import grpc
from grpc_tools import protoc

PROTO = pathlib.Path(__file__).resolve().parents[2] / "proto"


def generate_client(folder):
    """Compiles the protos into `folder` and imports the messages and the stubs of the job service."""
    names = [f"espalier/v1/{name}.proto" for name in ("spec", "jobs")]
    well_known = pathlib.Path(protoc.__file__).parent / "_proto"
    arguments = ["protoc", f"-I{PROTO}", f"-I{well_known}", f"--python_out={folder}", f"--grpc_python_out={folder}"]
    if protoc.main(arguments + names) != 0:
        sys.exit("the protos do not compile")
    sys.path.insert(0, folder)
    modules = ("espalier.v1.spec_pb2", "espalier.v1.jobs_pb2", "espalier.v1.jobs_pb2_grpc")
    return [importlib.import_module(name) for name in modules]


def where():
    """Address and token, from the environment or from a running `espalier up`."""
    if "ESPALIER_URL" in os.environ:
        return os.environ["ESPALIER_URL"], os.environ.get("ESPALIER_TOKEN", "")
    folder = pathlib.Path(os.environ.get("ESPALIER_DATA_DIR", pathlib.Path.home() / ".local/share/espalier"))
    try:
        up = json.loads((folder / "up.json").read_text())
    except FileNotFoundError:
        sys.exit(f"no `espalier up` runs on {folder}: start it, or set ESPALIER_URL and ESPALIER_TOKEN")
    return up["url"], up["token"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", required=True, help="what the user says")
    parser.add_argument("--mcp", action="append", default=[], help="an MCP server that the worker knows; repeatable")
    parser.add_argument("--contains", help="the answer must hold this text")
    parser.add_argument("--samples", type=int, default=1, help="how many tries")
    parser.add_argument("--batch", default=f"python-{int(time.time())}")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        spec, jobs, services = generate_client(folder)
    url, token = where()
    metadata = [("authorization", f"Bearer {token}")]
    with grpc.insecure_channel(url.removeprefix("http://")) as channel:
        service = services.JobServiceStub(channel)
        return run(args, spec, jobs, service, metadata)


def run(args, spec, jobs, service, metadata):
    verify = spec.Verifier(answer=spec.AnswerCheck(contains=args.contains)) if args.contains else None
    defaults = spec.JobSpec(rollout=spec.RolloutSpec(mcp=[spec.McpUse(name=name) for name in args.mcp], verify=verify))
    service.OpenBatch(jobs.OpenBatchRequest(batch=args.batch, defaults=defaults), metadata=metadata, timeout=30)

    specs = [
        spec.JobSpec(
            id=f"sample-{i}", rollout=spec.RolloutSpec(task_id="python", sample_index=i, prompts=[args.prompt])
        )
        for i in range(args.samples)
    ]
    answer = service.SubmitChunk(
        jobs.SubmitChunkRequest(batch=args.batch, chunk=0, jobs=specs), metadata=metadata, timeout=60
    )
    for rejection in answer.rejected:
        for error in rejection.errors:
            print(f"{rejection.id}: `{error.field}` {error.rule}, got `{error.value}`", file=sys.stderr)
    service.CloseBatch(jobs.CloseBatchRequest(batch=args.batch), metadata=metadata, timeout=30)

    first = None
    for event in service.WatchBatch(jobs.WatchBatchRequest(batch=args.batch), metadata=metadata):
        for job in event.ended:
            state = jobs.JobState.Name(job.state).removeprefix("JOB_STATE_").lower()
            print(f"{job.id}: {state}, reward {job.summary.reward}, {job.summary.turns} turns")
            if job.state == jobs.JOB_STATE_SUCCEEDED and first is None:
                first = job.id
    if first is not None:
        pieces = service.GetTrace(jobs.GetTraceRequest(batch=args.batch, id=first), metadata=metadata)
        trace = json.loads(b"".join(piece.data for piece in pieces))
        print(f"trace {trace['id']}: {len(trace['messages'])} messages")
        print(json.dumps(trace["messages"][-1], ensure_ascii=False))
    return 0 if first is not None and not answer.rejected else 1


if __name__ == "__main__":
    sys.exit(main())
