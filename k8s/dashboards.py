"""Queries against the names that programs emit: a panel that is empty for ever looks like one that is well, and so does an
alert.

Names are turned as the collector's Prometheus exporter turns them: dots to underscores, the unit behind, `_total` for counters.
"""

import json
import re
from functools import cache
from pathlib import Path

import promql_parser

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "k8s/espalier/dashboards"
NAMES = ROOT / "crates/runtime/src/telemetry/names.rs"
SERVED = ROOT / "infer-worker/src/api/metrics.rs"
UNITS = {"s": "_seconds", "By": "_bytes"}
PARTS = ("_bucket", "_sum", "_count")
# Where the values of labels are written.
WRITTEN = ["crates/core/src/queue", "crates/core/src/error.rs", "coordinator/src/session", "crates/runtime/src/model"]
# Of Prometheus' histograms, and of what it adds to all it fetches.
OWN_LABELS = {"le", "instance"}
# What Grafana puts in.
INTERVALS = {"$__rate_interval": "5m"}


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


@cache
def literals():
    """Every text in the sources that labels get their values from."""
    files = [file for place in map(ROOT.joinpath, WRITTEN) for file in ([place] if place.is_file() else place.rglob("*.rs"))]
    return {text for file in files for text in re.findall(r'"(\w+)"', file.read_text())}


def walk(node):
    """A node of a query and all below it."""
    yield node
    for name in ("lhs", "rhs", "expr", "param", "vector_selector", "args"):
        below = getattr(node, name, None)
        for one in below if isinstance(below, list) else [below]:
            if isinstance(one, (promql_parser.Expr, promql_parser.VectorSelector)):
                yield from walk(one)


def labels_of(modifier):
    """The labels that a modifier of a sum or of a comparison names."""
    matching = getattr(modifier, "matching", modifier)
    return list(getattr(matching, "labels", None) or [])


def query_faults(where, query):
    for macro, interval in INTERVALS.items():
        query = query.replace(macro, interval)
    try:
        tree = promql_parser.parse(query)
    except ValueError as error:
        return [f"{where}: {error}: {query}"]
    names, labels = emitted()
    found, used = [], set()
    for node in walk(tree):
        if isinstance(node, promql_parser.VectorSelector):
            if node.name not in names:
                found.append(f"{where}: nothing emits {node.name}")
            for matcher in node.matchers.matchers:
                used.add(matcher.name)
                found += value_faults(where, matcher)
        used |= set(labels_of(getattr(node, "modifier", None)))
    return found + [f"{where}: nothing has the label {label}" for label in sorted(used - labels - OWN_LABELS)]


def value_faults(where, matcher):
    """Words that a label of ours is held against have to be written somewhere."""
    if not matcher.name.startswith("espalier_"):
        return []
    words = matcher.value.split("|")
    return [f"{where}: {matcher.name} is never {word}" for word in words if word not in literals()]


def faults():
    found, queries = [], 0
    for file in sorted(FOLDER.glob("*.json")):
        for panel in json.loads(file.read_text())["panels"]:
            for target in panel["targets"]:
                queries += 1
                found += query_faults(f"{file.name}, {panel['title']}", target["expr"])
    if not queries:
        found.append("there are no dashboards")
    return found + unnoticed()


# What has to be found in a query, and a word of the fault.
SPOILT = {
    "rate(espalier_no_such_total[5m])": "nothing emits",
    "max by (espalier_no_such) (espalier_queue_depth)": "has the label",
    'espalier_queue_depth{espalier_no_such="ready"}': "has the label",
    'espalier_queue_depth{espalier_job_state="redy"}': "is never redy",
    "espalier_queue_depth and on (espalier_no_such) espalier_queue_depth": "has the label",
    "rate(espalier_queue_depth)": "expected type",
    "sum(espalier_queue_depth": "unclosed",
}


def unnoticed():
    def told(query, word):
        return any(word in fault for fault in query_faults("", query))

    return [f"nobody notices {query}" for query, word in SPOILT.items() if not told(query, word)]
