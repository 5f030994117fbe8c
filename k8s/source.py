"""What the chart says to the programs, against their sources: options, variables, keys of configurations, times to end."""

import re
import tomllib
from functools import cache
from pathlib import Path

from rules import pods

ROOT = Path(__file__).resolve().parent.parent
# Read by all processes, beside those of other programs.
COMMON = {"ESPALIER_LOG"}
CONFIGS = {
    "coordinator": ("ESPALIER_COORDINATOR_", "coordinator/src/config.rs", "CoordinatorConfig"),
    "agent-worker": ("ESPALIER_AGENT_WORKER_", "agent-worker/src/config.rs", "AgentWorkerConfig"),
}
OPTIONS = {
    "coordinator": ["coordinator/src/main.rs"],
    "agent-worker": ["agent-worker/src/main.rs"],
    "infer-worker": ["infer-worker/src/config.rs", "infer-worker/src/jobs/mod.rs"],
    "train-worker": ["train-worker/src/config.rs"],
}
# Keys that the chart sets from values of its own.
SET = {
    "coordinator": {"listen", "queue", "store_url", "drain_limit_s", "tokens", "tls"},
    "agent-worker": {
        "coordinator_url", "token", "tls", "data_dir", "store_url", "model_keys", "model_name", "mcp_config",
        "playwright_dir", "slots", "cpu_slots", "grace_s", "health_listen",
    },
}  # fmt: skip
# Keys that mean nothing in a cluster, or that the environment sets for all processes alike.
NOT_SET = {"coordinator": {"data_dir", "telemetry"}, "agent-worker": {"mcp_servers", "telemetry"}}
VALUES = {"coordinator": "coordinator", "agent-worker": "agentWorker"}


@cache
def text(path):
    return (ROOT / path).read_text().split("#[cfg(test)]\nmod tests {")[0]


@cache
def keys(component):
    """The fields of a configuration."""
    _, path, struct = CONFIGS[component]
    body = re.search(rf"pub struct {struct} {{(.*?)\n}}", text(path), re.S).group(1)
    return set(re.findall(r"^    pub (\w+):", body, re.M))


@cache
def options(component):
    """The options of a program, and the variables that stand for them."""
    body = "\n".join(map(text, OPTIONS[component]))
    found = {"--version", "--help"}
    for attribute, name in re.findall(r"#\[arg\((.*?)\)\]\s+(?:pub )?(\w+):", body, re.S):
        given = re.search(r'long = "([^"]+)"', attribute)
        found.add("--" + (given.group(1) if given else name.replace("_", "-")))
    return found, set(re.findall(r'"(ESPALIER_[A-Z_]+)"', body))


def variable_faults(pod, variable):
    if not variable.startswith("ESPALIER_") or variable in COMMON:
        return []
    names = options(pod.component)[1]
    if variable in names:
        return []
    if pod.component in CONFIGS:
        prefix = CONFIGS[pod.component][0]
        key = variable.removeprefix(prefix).split("__")[0].lower()
        if variable.startswith(prefix) and key in keys(pod.component):
            return []
    return [f"{pod.where}: the program has no variable {variable}"]


def grace(pod, config):
    """Seconds that the program gives itself, by its configuration or its options."""
    for argument in pod.spec["containers"][0].get("args", []):
        if argument.startswith("--shutdown-timeout="):
            return int(argument.partition("=")[2])
    return config.get("drain_limit_s", config.get("grace_s"))


def time_faults(pod, config):
    """The cluster must not kill what still ends in order."""
    main = text(f"{pod.component}/src/main.rs")
    margin = int(re.search(r"DRAIN_MARGIN: Duration = Duration::from_secs\((\d+)\)", main).group(1))
    flush = re.search(r"FLUSH_LIMIT: Duration = Duration::from_secs\((\d+)\)", text("crates/runtime/src/process.rs"))
    stop = pod.spec["containers"][0].get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    needed = grace(pod, config) + margin + int(flush.group(1)) + stop
    given = pod.spec.get("terminationGracePeriodSeconds", 30)
    if given >= needed:
        return []
    return [f"{pod.where}: has {given} s to end, needs {needed}"]


def read_config(pod, things):
    """The configuration that a pod is given, and what is wrong with it."""
    for thing in things:
        name = f"{pod.component}.toml"
        if thing["kind"] == "ConfigMap" and name in thing["data"]:
            try:
                config = tomllib.loads(thing["data"][name])
            except tomllib.TOMLDecodeError as error:
                return {}, [f"{pod.where}: {name} is no TOML: {error}"]
            unknown = [key for key in config if key not in keys(pod.component)]
            return config, [f"{pod.where}: the configuration has no key {key}" for key in unknown]
    return {}, []


def faults(things):
    found = []
    for pod in pods(things):
        config, told = read_config(pod, things)
        found += told
        for container in pod.containers:
            for argument in container.get("args", []):
                name = argument.partition("=")[0]
                if name.startswith("--") and name not in options(pod.component)[0]:
                    found.append(f"{pod.where}: the program has no option {name}")
            for variable in container.get("env", []):
                found += variable_faults(pod, variable["name"])
        if not told:
            found += time_faults(pod, config)
    return found


def faults_of_the_schema(schema):
    """Every key of a configuration can be set, in one place."""
    found = []
    for component, values in VALUES.items():
        free = set(schema["properties"][values]["properties"]["config"]["properties"])
        have = keys(component)
        accounted = free | SET[component] | NOT_SET[component]
        found += [f"values.schema.json: {values}.config must have the key {key}" for key in sorted(have - accounted)]
        found += [f"{values}: the configuration has no key {key}" for key in sorted(accounted - have)]
        found += [f"{values}.config: the chart sets {key} itself" for key in sorted(free & SET[component])]
    return found
