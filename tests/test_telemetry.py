"""What a worker tells: increments that add up, and gauges of the stream."""

from __future__ import annotations

import pytest

from serving.engine import Score
from serving.ood import Verdict
from serving.telemetry import BUCKET, COUNT, DRIFT_IMAGES, DRIFT_STRANGE, METRICS, SUM, ScoreTelemetry


def score(bpd: float, uniform: float | None = 0.5) -> Score:
    verdict = None if uniform is None else Verdict(0.0, 0.5, uniform, ())
    return Score(bpd, {}, None, verdict)


def values(telemetry: ScoreTelemetry) -> dict[tuple, float]:
    return {(m.metric, *m.labels): m.value for m in telemetry.collect()}


def test_a_histogram_of_increments() -> None:
    telemetry = ScoreTelemetry()
    assert telemetry.collect() == []
    telemetry.observe([(score(3.7), True), (score(3.9), True), (score(50.0), True)])
    found = values(telemetry)
    assert found[BUCKET, "4"] == 2 and found[BUCKET, "+Inf"] == found[COUNT,] == 3
    assert found[BUCKET, "3.5"] == 0 and found[SUM,] == pytest.approx(57.6)
    assert telemetry.collect() == []
    telemetry.observe([(score(3.7), True)])
    again = values(telemetry)
    assert again[COUNT,] == again[BUCKET, "4"] == 1 and again[DRIFT_IMAGES,] == 4


def test_images_without_a_verdict_are_no_drift() -> None:
    telemetry = ScoreTelemetry()
    telemetry.observe([(score(4.0, None), True), (score(4.0), False)])
    assert {m.metric for m in telemetry.collect()} == {BUCKET, SUM, COUNT}
    telemetry.observe([(score(4.0, 1e-4), True)])
    assert values(telemetry)[DRIFT_STRANGE,] == pytest.approx(3.72 - 0.5, abs=0.01)


def test_names_are_prometheus_names() -> None:
    assert len({m.name for m in METRICS}) == len(METRICS)
    assert all(m.name.replace("_", "a").isalpha() and m.name.startswith("ade_") for m in METRICS)
