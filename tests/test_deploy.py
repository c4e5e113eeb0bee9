"""What lies in deploy/, as far as it can be checked without a cluster or a container engine.

The tools are used where they are installed: promtool (a Debian package), kustomize and docker-compose
(likewise), yamllint and kubernetes-validate (extra ``dev``).
"""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import Any

import pytest
import yaml

from handlers.torchserve.exposition import INFERENCES, LATENCY, QUEUE, REFUSALS, RESPONSES
from handlers.torchserve.reporter import COMMON_LABELS
from serving.api.telemetry import METRICS
from tests.conftest import ROOT

DEPLOY = ROOT / "deploy"
RULES = DEPLOY / "prometheus" / "service-rules.yml"
SCRAPED = {"job", "instance"}  # labels that Prometheus adds


def load(path: Any) -> Any:
    return yaml.safe_load(path.read_text())


def tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


# Prometheus


def test_alarms_are_about_metrics_that_exist() -> None:
    known = {metric.name: {*COMMON_LABELS, *metric.labels} for metric in METRICS}
    known |= {m.name: set(m.labels) for m in (REFUSALS, RESPONSES)}
    known |= {m.name: {"model_name"} for m in (INFERENCES, LATENCY, QUEUE)}
    known["up"] = set()
    rules = [rule for group in load(RULES)["groups"] for rule in group["rules"]]
    for rule in rules:
        for name, labels in re.findall(r"\b((?:ade|ts)_\w+|up)\{([^}]*)\}", rule["expr"]):
            used = set(re.findall(r"(\w+)=", labels))
            assert used <= known[name] | SCRAPED, rule["alert"]
            for grouped in re.findall(r"by \(([^)]*)\)", rule["expr"]):
                assert set(grouped.split(", ")) <= known[name] | SCRAPED, rule["alert"]
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert set(rule["annotations"]) == {"summary", "description"}
    assert len(rules) == 5


@pytest.mark.parametrize(
    "command",
    [("check", "rules", RULES), ("test", "rules", ROOT / "tests/data/service-rules-test.yml")],
)
def test_promtool_accepts_the_alarms(command: tuple[Any, ...]) -> None:
    """Among others, one restart of a worker is not an alarm."""
    done = subprocess.run([tool("promtool"), *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
