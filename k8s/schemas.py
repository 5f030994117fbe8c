"""Objects against schemas: Kubernetes' own, strictly, and closed ones for what else the chart uses."""

import json
from functools import cache
from pathlib import Path

import jsonschema
import kubernetes_validate

# The oldest version that the chart takes, and the newest whose schemas there are.
VERSIONS = ("1.30", "1.37")
FILES = {"keda.sh/v1alpha1": "keda.json", "monitoring.coreos.com/v1": "prometheus.json"}
HERE = Path(__file__).resolve().parent / "schemas"


@cache
def foreign(api):
    return json.loads((HERE / FILES[api]).read_text())


def validate(schema, value, where):
    validator = jsonschema.Draft202012Validator(schema)
    return [f"{where}: {'.'.join(map(str, error.path))}: {error.message}" for error in validator.iter_errors(value)]


def own(thing, where):
    """By Kubernetes' schemas, which take no field that they do not know."""
    return list(own_text(json.dumps(thing), where))


@cache
def own_text(text, where):
    """The same object is met again and again, and a look takes long."""
    thing, faults = json.loads(text), []
    for version in VERSIONS:
        try:
            kubernetes_validate.validate(thing, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            path = ".".join(map(str, error.path))
            faults.append(f"{where}: not by Kubernetes {version}: {path}: {error.message}")
        except Exception as error:  # an object without a schema is a fault as well
            faults.append(f"{where}: not by Kubernetes {version}: {error}")
    return faults


def parts(thing):
    """What is Kubernetes' own in an object of KEDA, as an object of its own."""
    spec = thing["spec"]
    if "jobTargetRef" in spec:
        yield {"apiVersion": "batch/v1", "kind": "Job", "metadata": thing["metadata"], "spec": spec["jobTargetRef"]}
    behavior = spec.get("advanced", {}).get("horizontalPodAutoscalerConfig", {}).get("behavior")
    if behavior:
        target = {"apiVersion": "apps/v1", "kind": "Deployment", "name": "x"}
        spec = {"scaleTargetRef": target, "maxReplicas": 1, "behavior": behavior}
        kind = {"apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler"}
        yield {**kind, "metadata": thing["metadata"], "spec": spec}


def faults(things):
    found = []
    for thing in things:
        where = f"{thing['kind']} {thing['metadata']['name']}"
        api = thing["apiVersion"]
        if api not in FILES:
            found += own(thing, where)
            continue
        schema = foreign(api)
        if thing["kind"] not in schema:
            found.append(f"{where}: {api} has no schema for it in {FILES[api]}")
            continue
        extra = set(thing) - {"apiVersion", "kind", "metadata", "spec"}
        found += [f"{where}: {name} is unknown" for name in extra]
        found += validate({**schema[thing["kind"]], "$defs": schema.get("$defs", {})}, thing["spec"], where)
        for part in parts(thing):
            found += own(part, where)
    return found
