"""Checks the Helm chart: what each file of k8s/ci renders to, by Kubernetes' and KEDA's schemas, by rules of safety, and
against the options and keys that the programs have.

Usage: check.py HELM
"""

import concurrent.futures
import copy
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

import alerts
import dashboards
import guide
import rules
import schemas
import source

HERE = Path(__file__).resolve().parent
CHART = HERE / "espalier"


def helm(binary, *arguments, values):
    """What helm prints, and its complaint where it refuses."""
    files = [part for file in values for part in ("-f", str(file))]
    command = [binary, *arguments, *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.stdout, None if done.returncode == 0 else done.stderr + done.stdout


def render(binary, *values):
    out, refused = helm(binary, "template", "release", str(CHART), "--namespace", "ml", values=values)
    if refused:
        return [], refused
    return [thing for thing in yaml.safe_load_all(out) if thing], None


def check_values(binary, file):
    """Everything about one file of values."""
    _, refused = helm(binary, "lint", str(CHART), "--strict", "--quiet", values=[file])
    if refused:
        return [f"helm lint: {refused.strip()}"], []
    things, refused = render(binary, file)
    if refused:
        return [f"helm template: {refused.strip()}"], []
    return schemas.faults(things) + rules.faults(things) + source.faults(things), things


def check_example(binary):
    """Whether what the guide has a reader copy is as good as the files of k8s/ci."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(guide.example())
        file.flush()
        told, _ = check_values(binary, file.name)
    return [f"the example of {guide.GUIDE.name}: {fault}" for fault in told]


def check_refused(binary, case):
    """Whether what has to be refused is, with words that say what to change."""
    file = HERE / "ci" / case["over"]
    values = yaml.safe_load(file.read_text())
    for path, value in case["set"].items():
        *parents, last = path.split(".")
        at = values
        for parent in parents:
            at = at.setdefault(parent, {})
        at[last] = value
    command = [binary, "template", "release", str(CHART), "-f", "-"]
    done = subprocess.run(command, input=json.dumps(values), capture_output=True, text=True, timeout=60)
    if done.returncode == 0:
        return [f"{case['set']} is rendered, and should be refused with `{case['says']}`"]
    if case["says"] not in done.stderr:
        return [f"{case['set']} is refused with `{done.stderr.strip()}`, not with `{case['says']}`"]
    return []


def check_rules(things):
    """Whether the rules find what breaks them: a rule that finds nothing would hold nothing."""
    found = []
    for name, spoil, expected in rules.SPOILT:
        spoilt = copy.deepcopy(things)
        spoil(spoilt)
        told = schemas.faults(spoilt) + rules.faults(spoilt) + source.faults(spoilt)
        if not any(expected in fault for fault in told):
            found.append(f"nobody notices {name}: expected a fault with `{expected}`")
    return found


def main(binary):
    files = sorted(file for file in (HERE / "ci").glob("*.yaml") if file.name != "refused.yaml")
    cases = yaml.safe_load((HERE / "ci" / "refused.yaml").read_text())
    faults, passed = [], 0
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for file, (told, things) in zip(files, pool.map(lambda file: check_values(binary, file), files)):
            faults += [f"{file.name}: {fault}" for fault in told]
            passed += not told
            print(f"{file.name}: {len(things)} objects, {len(told)} faults")
            if file.name == "full.yaml" and not told:
                told = check_rules(things)
                faults += told
                passed += len(rules.SPOILT) - len(told)
        for case, told in zip(cases, pool.map(lambda case: check_refused(binary, case), cases)):
            faults += [f"refused.yaml: {fault}" for fault in told]
            passed += not told
    told = source.faults_of_the_schema(json.loads((CHART / "values.schema.json").read_text()))
    for told in (told, dashboards.faults(), alerts.faults(), guide.faults(), check_example(binary)):
        faults += told
        passed += not told
    for fault in faults:
        print(f"FAULT {fault}", file=sys.stderr)
    print(f"chart: {passed} passed, {len(faults)} failed")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
