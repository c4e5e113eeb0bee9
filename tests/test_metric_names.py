"""The names, types and labels of all metrics of a running service, as in ``data/metrics.json``.

They are the same with each engine.

Dashboards and alarm rules of other people use them. If a change is intended, record again, read the
diff and look through deploy/::

    python -m tests.test_metric_names --record
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator

import httpx
import pytest

from handlers.launch.engines import default_engine
from tests.helpers import DATA, PRETRAINED, ROOT, check_metrics, wait_for
from tests.service import RunningService

RECORD = DATA / "metrics.json"
ENGINES = (default_engine(), "process")
EXAMPLE = ROOT / "serving" / "examples" / "cat.png"
# Shown only after something went wrong, which another test may have caused before.
RARE = {"ade_worker_failures_total": ["counter", "bundle", "code", "model_name"]}
RULES = ("grafana.json", "prometheus/gate-rules.yml", "prometheus/service-rules.yml")


def names(text: str) -> dict[str, list[str]]:
    """The type and the labels of each metric of an exposition."""
    types = dict(re.findall(r"^# TYPE (\w+) (\w+)$", text, re.MULTILINE))
    labels: dict[str, set[str]] = {name: set() for name in types}
    for name, inner in re.findall(r"^(\w+)(?:\{(.*)\})? \S+$", text, re.MULTILINE):
        family = name if name in types else re.sub("_(bucket|sum|count)$", "", name)
        labels[family].update(re.findall(r'(\w+)="', inner))
    return {name: [types[name], *sorted(labels[name])] for name in sorted(types)}


def found(running: RunningService) -> dict[str, list[str]]:
    """The metrics of a service that has answered, failed and refused requests."""
    url = f"{running.url}/predictions"
    with httpx.Client(timeout=60) as client:
        assert client.post(f"{url}/score", content=EXAMPLE.read_bytes()).status_code == 200
        assert client.post(f"{url}/score", content=b"not an image").status_code == 415
        assert client.post(f"{url}/sample", json={"seed": 1}).status_code == 200
        assert client.post(f"{url}/other").status_code == 404
    seen: list[dict[str, list[str]]] = [{}]

    def all_are_there() -> bool:  # workers report from time to time
        seen[0] = names(httpx.get(f"{running.metrics}/metrics").text)
        drift = seen[0].get("ade_drift_images", [])
        return "calibration" in drift and "code" in seen[0].get("ade_requests_total", [])

    wait_for(all_are_there, 60)
    return {name: about for name, about in seen[0].items() if name not in RARE}


@pytest.fixture(scope="module", params=ENGINES)
def running(request: pytest.FixtureRequest) -> Iterator[RunningService]:
    if request.param == default_engine():
        yield request.getfixturevalue("service")
        return
    other = RunningService(PRETRAINED, options=("--engine", request.param, "--workers", "1"))
    yield other
    assert other.stop() == []


def test_metrics_are_as_recorded(running: RunningService) -> None:
    assert found(running) == json.loads(RECORD.read_text())
    check_metrics(httpx.get(f"{running.metrics}/metrics").text)


@pytest.mark.parametrize("file", RULES)
def test_deploy_uses_recorded_metrics(file: str) -> None:
    text = (ROOT / "deploy" / file).read_text()
    known = json.loads(RECORD.read_text()).keys() | RARE.keys()
    alerts = set(re.findall(r"record: (\w+)", text))
    for name in set(re.findall(r"\b(?:ade|process)_\w+", text)) - alerts:
        assert known & {name, re.sub("_(bucket|sum|count)$", "", name)}, name


def write_record() -> None:
    service = RunningService(PRETRAINED)
    try:
        lines = [
            f"{json.dumps(name)}: {json.dumps(about)}" for name, about in found(service).items()
        ]
    finally:
        service.stop()
    RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Record the metrics of the service.")
    parser.add_argument("--record", action="store_true", required=True)
    parser.parse_args()
    write_record()
