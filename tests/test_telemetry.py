"""What a worker tells: increments that add up, and gauges of the stream."""

from __future__ import annotations

import pytest

from serving.api.telemetry import (
    BATCH,
    BPD,
    DRIFT_IMAGES,
    DRIFT_STRANGE,
    FAMILIES,
    IMAGES,
    INFO,
    METRICS,
    REQUESTS,
    SECONDS,
    STAGE_SECONDS,
    STARTS,
    Telemetry,
)
from serving.engine.engine import Score
from serving.verdict.calibration import Verdict


def score(bpd: float, uniform: float | None = 0.5) -> Score:
    verdict = None if uniform is None else Verdict(0.0, 0.5, uniform, ())
    return Score(bpd, {}, None, verdict)


def started() -> Telemetry:
    telemetry = Telemetry("model@1", "onnxruntime/CPU")
    assert {(m.metric, m.labels) for m in telemetry.collect()} == {
        (STARTS, ()),
        (INFO, ("model@1", "onnxruntime/CPU")),
    }
    return telemetry


def values(telemetry: Telemetry) -> dict[tuple, float]:
    return {(m.metric, *m.labels): m.value for m in telemetry.collect()}


def test_a_histogram_of_increments() -> None:
    telemetry = started()
    assert telemetry.collect() == []
    telemetry.observe_scores([score(3.7), score(3.9), score(50.0)])
    found = values(telemetry)
    assert found[BPD.bucket, "4"] == 2 and found[BPD.bucket, "+Inf"] == found[BPD.count,] == 3
    assert found[BPD.bucket, "3.5"] == 0 and found[BPD.sum,] == pytest.approx(57.6)
    assert telemetry.collect() == []
    telemetry.observe_scores([score(3.7)])
    again = values(telemetry)
    assert again[BPD.count,] == again[BPD.bucket, "4"] == 1 and again[DRIFT_IMAGES,] == 4


def test_images_without_a_verdict_are_no_drift() -> None:
    telemetry = started()
    telemetry.observe_scores([score(4.0, None)])
    assert {m.metric for m in telemetry.collect()} == {BPD.bucket, BPD.sum, BPD.count}
    telemetry.observe_scores([score(4.0, 1e-4)])
    assert values(telemetry)[DRIFT_STRANGE,] == pytest.approx(3.72 - 0.5, abs=0.01)


def test_requests_and_where_their_time_goes() -> None:
    telemetry = started()
    telemetry.observe_batch(
        [(200, ""), (200, ""), (415, "not_an_image")], 3, {"parse": 0.01, "compute": 0.05}
    )
    found = values(telemetry)
    assert (
        found[REQUESTS, "200", "none"] == 2
        and found[REQUESTS, "415", "not_an_image"] == 1
        and found[IMAGES,] == 3
    )
    assert found[STAGE_SECONDS, "compute"] == pytest.approx(0.15)
    assert (
        found[SECONDS.bucket, "0.1"] == found[SECONDS.count,] == 3
        and found[SECONDS.bucket, "0.05"] == 0
    )
    assert found[BATCH.bucket, "4"] == 1 and found[BATCH.sum,] == 3
    assert telemetry.collect() == []
    telemetry.observe_batch([(200, "")], 1, {"compute": 0.2})
    assert (SECONDS.bucket, "0.1") not in values(telemetry)


def test_names_are_prometheus_names() -> None:
    assert len({m.name for m in METRICS}) == len(METRICS)
    assert all(m.name.replace("_", "a").isalpha() and m.name.startswith("ade_") for m in METRICS)
    assert {m.name.endswith("_total") for m in FAMILIES if m.kind == "counter"} == {True}
