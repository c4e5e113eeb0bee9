"""The names, types and labels of all metrics of a running service, as in ``data/metrics.json``.

They are the same with each engine: test_process.py compares those of its own processes.

Dashboards and alarm rules of other people use them. If a change is intended, record again, read the
diff and look through deploy/::

    python -m tests.test_metric_names --record
"""

from __future__ import annotations

import argparse
import json
import re

import httpx
import pytest

from tests.helpers import DATA, PRETRAINED, ROOT, check_metrics, wait_for
from tests.service import RunningService

RECORD = DATA / "metrics.json"
EXAMPLE = ROOT / "serving" / "examples" / "cat.png"
# Shown only after something went wrong, which another test may have caused before.
RARE = {"ade_worker_failures_total": ["counter", "bundle", "code", "model_name"]}
RULES = ("grafana.json", "prometheus/gate-rules.yml", "prometheus/service-rules.yml")


def names(text):
    """The type and the labels of each metric of an exposition."""
    types = dict(re.findall(r"^# TYPE (\w+) (\w+)$", text, re.MULTILINE))
    labels: dict[str, set[str]] = {name: set() for name in types}
    for name, inner in re.findall(r"^(\w+)(?:\{(.*)\})? \S+$", text, re.MULTILINE):
        family = name if name in types else re.sub("_(bucket|sum|count)$", "", name)
        labels[family].update(re.findall(r'(\w+)="', inner))
    return {name: [types[name], *sorted(labels[name])] for name in sorted(types)}


def found_metrics(url, metrics):
    """The metrics at an address of a service that has answered, failed and refused requests."""
    url = f"{url}/predictions"
    with httpx.Client(timeout=60) as client:
        assert client.post(f"{url}/score", content=EXAMPLE.read_bytes()).status_code == 200
        assert client.post(f"{url}/score", content=b"not an image").status_code == 415
        assert client.post(f"{url}/sample", json={"seed": 1}).status_code == 200
        assert client.post(f"{url}/other").status_code == 404
    seen: list[dict[str, list[str]]] = [{}]

    def all_are_there():  # workers report from time to time
        seen[0] = names(httpx.get(metrics).text)
        drift = seen[0].get("ade_drift_images", [])
        return "calibration" in drift and "code" in seen[0].get("ade_requests_total", [])

    wait_for(all_are_there, 60)
    return {name: about for name, about in seen[0].items() if name not in RARE}


def test_metrics_are_as_recorded(service):
    metrics = f"{service.metrics}/metrics"
    assert found_metrics(service.url, metrics) == json.loads(RECORD.read_text())
    check_metrics(httpx.get(metrics).text)


@pytest.mark.parametrize("file", RULES)
def test_deploy_uses_recorded_metrics(file):
    text = (ROOT / "deploy" / file).read_text()
    known = json.loads(RECORD.read_text()).keys() | RARE.keys()
    alerts = set(re.findall(r"record: (\w+)", text))
    for name in set(re.findall(r"\b(?:ade|process)_\w+", text)) - alerts:
        assert known & {name, re.sub("_(bucket|sum|count)$", "", name)}, name


def write_record():
    service = RunningService(PRETRAINED)
    try:
        found = found_metrics(service.url, f"{service.metrics}/metrics")
        lines = [f"{json.dumps(name)}: {json.dumps(about)}" for name, about in found.items()]
    finally:
        service.stop()
    RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Record the metrics of the service.")
    parser.add_argument("--record", action="store_true", required=True)
    parser.parse_args()
    write_record()
