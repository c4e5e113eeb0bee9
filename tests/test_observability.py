"""Where time goes, what is logged, and the dashboard that shows it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from handlers.launch.profile import profile_table, read_totals
from handlers.torchserve.launcher import TorchServe
from handlers.torchserve.reporter import COMMON_LABELS
from serving.api.journal import Journal, last_errors
from serving.api.telemetry import METRICS, Stopwatch
from tests.conftest import ROOT

METRICS_TEXT = """# HELP ade_requests Torchserve prometheus counter metric
ade_requests{model_name="score",worker="9001",status="200",code="none",hostname="h",} 3.0
ade_requests{model_name="score",worker="9002",status="415",code="not_an_image",hostname="h",} 1.0
ade_images{model_name="score",worker="9001",hostname="h",} 8.0
ade_stage_seconds{model_name="score",worker="9001",stage="compute",hostname="h",} 0.04
ts_inference_latency_microseconds{uuid="u",model_name="score",model_version="default",hostname="h",} 80000.0
ts_queue_latency_microseconds{uuid="u",model_name="score",model_version="default",hostname="h",} 20000.0
ts_queue_latency_microseconds{uuid="u",model_name="sample",model_version="default",hostname="h",} 5.0
"""


def test_a_profile_is_what_is_new() -> None:
    totals = read_totals(METRICS_TEXT, TorchServe.timers)
    assert set(totals) == {"score"}
    assert totals["score"] == pytest.approx(
        {"requests": 4, "images": 8, "compute": 0.04, "whole": 0.08, "queue": 0.02}
    )
    head, line = profile_table({}, totals).splitlines()
    values = dict(zip(head.split()[3:], line.split()[1:], strict=True))
    assert values == {
        "requests": "4",
        "images": "8",
        "queue": "5.00",
        "parse": "0.00",
        "decode": "0.00",
        "compute": "10.00",
        "encode": "0.00",
        "carry": "5.00",
        "whole": "20.00",
    }
    assert profile_table(totals, totals) == ""


def test_a_stopwatch_adds_up_and_survives_errors() -> None:
    watch = Stopwatch()
    for _ in range(2):
        with pytest.raises(ValueError), watch("decode"):
            raise ValueError
    assert watch.seconds["decode"] > 0 and watch.seconds["compute"] == 0


def test_journals_keep_errors_findable(tmp_path: Path) -> None:
    first, second = Journal(tmp_path, "score-9001"), Journal(tmp_path, "score-9002")
    for i in range(4):
        first.write([{"operation": "score", "id": f"a{i}", "status": 200}] * 2)
        (first, second)[i % 2].write(
            [
                {
                    "operation": "score",
                    "id": f"b{i}",
                    "status": 415,
                    "code": "not_an_image",
                    "message": "not an image\nat all",
                }
            ]
        )
    with open(tmp_path / "score-9001.requests.jsonl", "a") as out:
        out.write('{"time": "2999", "code"')  # being written
    assert [entry["id"] for entry in last_errors(tmp_path, 3)] == ["b1", "b2", "b3"]
    lines = (tmp_path / "score-9002.requests.jsonl").read_text().splitlines()
    assert len(lines) == 2 and all(
        json.loads(line)["message"] == "not an image\nat all" for line in lines
    )


def test_the_dashboard_asks_for_metrics_that_exist() -> None:
    dashboard = json.loads((ROOT / "deploy" / "grafana.json").read_text())
    expressions = [
        target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])
    ]
    known = {metric.name: {*COMMON_LABELS, *metric.labels} for metric in METRICS}
    used = set()
    for expression in expressions:
        for name in re.findall(r"\bade_\w+", expression):
            assert name in known, expression
            used.add(name)
        for labels in re.findall(r"by \(([^)]*)\)", expression):
            mine = set().union(*(known[name] for name in re.findall(r"\bade_\w+", expression)))
            assert {label.strip() for label in labels.split(",")} <= mine | {"model_name"}, (
                expression
            )
    assert {
        "ade_requests",
        "ade_images",
        "ade_request_seconds_bucket",
        "ade_batch_images_bucket",
        "ade_bpd_bucket",
        "ade_worker_starts",
        "ade_drift_ks",
    } <= used
    places = [tuple(panel["gridPos"].values()) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places) and len(
        {panel["id"] for panel in dashboard["panels"]}
    ) == len(places)
