"""Alerts: their queries by what is emitted, their words by what they may name, and a page for each of them that says what to do."""

import re
from pathlib import Path

import yaml

import dashboards

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "k8s/espalier/alerts/rules.yaml"
PAGES = ROOT / "docs/runbooks"
GUIDE = ROOT / "docs/guides/operations.md"
COMMANDS = ROOT / "cli/src/args.rs"
HEADINGS = ["What it means", "How to look", "What to do"]
FIELDS = {"alert", "expr", "for", "labels", "annotations"}
SEVERITIES = {"critical", "warning"}
FUNCTIONS = {"", "humanize", "humanizeDuration", "humanizePercentage"}


def rules():
    return [rule for group in yaml.safe_load(FILE.read_text())["groups"] for rule in group["rules"]]


def summary_faults(where, rule, summary):
    """A label that the query does not keep would be shown as nothing."""
    found = []
    for inside in re.findall(r"{{(.*?)}}", summary):
        thing, _, function = (part.strip() for part in inside.partition("|"))
        label = thing.removeprefix("$labels.")
        if thing != "$value" and (label == thing or not re.search(rf"by \([^)]*\b{label}\b", rule["expr"])):
            found.append(f"{where}: the summary shows {thing}, which the query does not keep")
        if function not in FUNCTIONS:
            found.append(f"{where}: Prometheus has no function {function}")
    return found


def rule_faults(rule):
    where, found = f"alert {rule.get('alert')}", []
    found += [f"{where}: {field} is unknown" for field in sorted(set(rule) - FIELDS)]
    if not re.fullmatch(r"Espalier[A-Z][A-Za-z]+", rule.get("alert", "")):
        found.append(f"{where}: must be called Espalier…")
    if not re.fullmatch(r"[1-9][0-9]*[smhd]", rule.get("for", "1m")):
        found.append(f"{where}: `for` is {rule['for']}, which is no time")
    if set(rule.get("labels", {})) != {"severity"} or rule["labels"]["severity"] not in SEVERITIES:
        found.append(f"{where}: must have a severity of {sorted(SEVERITIES)} and no other label")
    if set(rule.get("annotations", {})) != {"summary", "runbook"}:
        return found + [f"{where}: must have a summary and a runbook"]
    found += summary_faults(where, rule, rule["annotations"]["summary"])
    return found + dashboards.query_faults(where, rule.get("expr", ""))


def page_faults(page, alert):
    where, text = f"runbooks/{page.name}", page.read_text()
    found = []
    if text.splitlines()[0] != f"# {alert}":
        found.append(f"{where}: must begin with `# {alert}`")
    if re.findall(r"^## (.*)$", text, re.M) != HEADINGS:
        found.append(f"{where}: must have the parts {HEADINGS}")
    names, _ = dashboards.emitted()
    for name in re.findall(r"`((?:espalier_|vllm:)\w+)`", text):
        if name not in names:
            found.append(f"{where}: nothing emits {name}")
    commands = {name.lower() for name in re.findall(r"^    (\w+)(?:\(.*\))?,$", COMMANDS.read_text(), re.M)}
    for command in re.findall(r"`espalier ([a-z]+)", text):
        if command not in commands:
            found.append(f"{where}: there is no command `espalier {command}`")
    return found


def faults():
    found, named = [], {}
    for rule in rules():
        found += rule_faults(rule)
        named[rule.get("annotations", {}).get("runbook", "")] = rule["alert"]
    if len(named) != len(rules()) or len(set(named.values())) != len(named):
        found.append("alerts must have names and pages of their own")
    pages = {str(page.relative_to(ROOT)): page for page in PAGES.glob("*.md")}
    found += [f"{alert}: there is no page {page}" for page, alert in named.items() if page not in pages]
    found += [f"{page}: there is no alert for it" for page in pages if page not in named]
    found += [fault for page, alert in named.items() if page in pages for fault in page_faults(pages[page], alert)]
    told = GUIDE.read_text()
    found += [f"{GUIDE.name} must tell of {alert}" for page, alert in named.items() if f"({Path('..') / Path(page).relative_to('docs')})" not in told]
    return found + unnoticed()


def unnoticed():
    """Whether each rule finds what breaks it."""
    good = rules()[0]
    expected = {
        "is unknown": {**good, "fro": "1m"},
        "which is no time": {**good, "for": "1 minute"},
        "must have a severity": {**good, "labels": {"severity": "high"}},
        "does not keep": {**good, "annotations": {**good["annotations"], "summary": "{{ $labels.espalier_batch_id }}"}},
        "has no function": {**good, "annotations": {**good["annotations"], "summary": "{{ $value | round }}"}},
        "nothing emits": {**good, "expr": "espalier_no_such > 1"},
    }
    return [f"nobody notices an alert that should be `{words}`" for words, rule in expected.items() if not any(words in fault for fault in rule_faults(rule))]
