"""The guide against the chart: its example is rendered as it stands, and every value that it names is one."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
GUIDE = ROOT / "docs/guides/kubernetes.md"
VALUES = ROOT / "k8s/espalier/values.yaml"
# Of Secrets, not of values.
KEYS_OF_SECRETS = {"tls.crt", "tls.key"}


def example():
    """The file of values that a reader copies, with digests of full length."""
    block = re.search(r"```yaml\n(# my-values\.yaml\n.*?)```", GUIDE.read_text(), re.S).group(1)
    return re.sub(r"\b([0-9a-f]+)…", lambda found: found[1].ljust(64, "0"), block)


def is_value(values, name):
    for part in name.split("."):
        if not isinstance(values, dict) or part not in values:
            return False
        values = values[part]
    return True


def faults():
    values = yaml.safe_load(VALUES.read_text())
    named = re.findall(r"`([a-z]\w*(?:\.\w+)+)(?::[^`]*)?`", GUIDE.read_text())
    named = {name for name in named if name.split(".")[0] in values} - KEYS_OF_SECRETS
    return [f"{GUIDE.name}: the chart has no value {name}" for name in sorted(named) if not is_value(values, name)]
