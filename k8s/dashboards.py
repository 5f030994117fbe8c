"""Queries of dashboards against the names that programs emit: a panel that is empty for ever looks like one that is well.

Names are turned as the collector's Prometheus exporter turns them: dots to underscores, the unit behind, `_total` for counters.
"""

import json
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "k8s/espalier/dashboards"
NAMES = ROOT / "crates/runtime/src/telemetry/names.rs"
SERVED = ROOT / "infer-worker/src/api/metrics.rs"
UNITS = {"s": "_seconds", "By": "_bytes"}
PARTS = ("_bucket", "_sum", "_count")
# Of Prometheus' language, of its histograms and of what it adds to all it fetches.
WORDS = set("sum max by rate increase topk histogram_quantile le instance".split())


def series(kind, unit, name):
    """What one instrument is called in Prometheus."""
    name = name.replace(".", "_") + UNITS.get(unit, "")
    if kind == "Counter":
        return {name + "_total"}
    if kind == "Histogram":
        return {name + part for part in PARTS}
    return {name + "_ratio" if kind == "Gauge" and unit == "1" else name}


@cache
def emitted():
    """Every series, and every label."""
    text = NAMES.read_text()
    metrics = re.search(r"pub mod metric \{(.*?)\n\}", text, re.S).group(1)
    labels = re.search(r"pub mod attribute \{(.*?)\n\}", text, re.S).group(1)
    names = set()
    for documented, name in re.findall(r"((?:    ///[^\n]*\n)+)    pub const \w+: &str =\s+\"([^\"]+)\"", metrics):
        kind, unit = re.match(r"\s*/// (Gauge|Counter|Histogram|Up-down counter), `([^`]+)`", documented).groups()
        names |= series(kind, unit, name)
    served = SERVED.read_text().split("#[cfg(test)]\nmod tests {")[0]
    for name in re.findall(r'"(vllm:\w+)"', served):
        names |= {name, *(name + part for part in PARTS)}
    labelled = {name.replace(".", "_") for name in re.findall(r'= "([^"]+)"', labels)}
    return names, labelled | set(re.findall(r"(\w+)=\\\"", served))


def query_faults(where, query):
    names, labels = emitted()
    bare = re.sub(r'"[^"]*"|\[[^]]*\]', "", query)
    words = set(re.findall(r"[a-zA-Z_][\w:]*", bare)) - WORDS
    return [f"{where}: nothing emits {word}" for word in sorted(words - names - labels)]


def faults():
    found, queries = [], 0
    for file in sorted(FOLDER.glob("*.json")):
        for panel in json.loads(file.read_text())["panels"]:
            for target in panel["targets"]:
                queries += 1
                found += query_faults(f"{file.name}, {panel['title']}", target["expr"])
    if not queries:
        found.append("there are no dashboards")
    if not query_faults("", "rate(espalier_no_such_total[5m])"):
        found.append("nobody notices a query of what nothing emits")
    return found
