"""The telemetry of a worker: counters that add up, and gauges of the stream."""

import math
import random
import time

import numpy as np
import pytest

from serving.api.telemetry import (
    BATCH,
    BPD,
    DRIFT_DISTANCE,
    DRIFT_IMAGES,
    DRIFT_UNUSUAL,
    DRIFT_USUAL,
    EXPECTED_FLAGS,
    FAMILIES,
    IMAGES,
    INFO,
    METRICS,
    OBSERVED_FLAGS,
    REQUESTS,
    SECONDS,
    STAGE_SECONDS,
    STARTS,
    VERSION,
    Telemetry,
)
from serving.engine.engine import Score
from serving.verdict.calibration import Verdict
from serving.verdict.calibration_file import CalibrationPair
from serving.verdict.drift import WINDOW


def score(bpd, p_value=0.5, name="default", version="1", beyond=None):
    """A score at alpha 0.05, judged by 99 calibration images."""
    verdict = None
    if p_value is not None:
        verdict = Verdict(0.0, p_value, p_value if beyond is None else beyond, (), 99)
    return Score(
        bpd, {}, None, verdict, calibrations=CalibrationPair(None, None, name, version)
    ), 0.05


def started():
    telemetry = Telemetry("model@1", "onnxruntime/CPU", judges=True)
    assert {(m.metric, m.labels) for m in telemetry.collect()} == {
        (STARTS, ()),
        (INFO, ("model@1", "onnxruntime/CPU")),
    }
    return telemetry


def values(telemetry):
    return {(m.metric, *m.labels): m.value for m in telemetry.collect()}


def test_a_histogram_of_increments():
    telemetry = started()
    assert telemetry.collect() == []
    telemetry.observe_scores([score(3.7), score(3.9), score(50.0)])
    found = values(telemetry)
    assert found[BPD.bucket, "4"] == 2 and found[BPD.bucket, "+Inf"] == found[BPD.count,] == 3
    assert found[BPD.bucket, "3.5"] == 0 and found[BPD.sum,] == pytest.approx(57.6)
    assert telemetry.collect() == []
    telemetry.observe_scores([score(3.7)])
    again = values(telemetry)
    assert again[BPD.count,] == again[BPD.bucket, "4"] == 1 and again[DRIFT_IMAGES, "default"] == 4


def test_images_without_a_verdict_are_not_counted_as_drift():
    telemetry = started()
    telemetry.observe_scores([score(4.0, None)])
    assert {m.metric for m in telemetry.collect()} == {BPD.bucket, BPD.sum, BPD.count}
    telemetry.observe_scores([score(4.0, 1e-4)])
    found = values(telemetry)[DRIFT_UNUSUAL, "default"]
    assert found == pytest.approx(3.72 - 0.5, abs=0.01)


def test_a_picture_that_repeats_is_no_drift_if_it_calibrates():
    """A fifth of the calibration images are one picture, and so is a fifth of what comes."""
    telemetry = started()
    random.seed(0)
    rng = np.random.default_rng(0)
    for _ in range(5 * WINDOW):
        repeated = rng.random() < 0.2
        p_value = 0.2 if repeated else rng.uniform(0.2, 1)
        telemetry.observe_scores([score(4.0, p_value, beyond=0.0 if repeated else None)])
    found = values(telemetry)
    assert found[DRIFT_DISTANCE, "default"] < 2
    assert max(found[DRIFT_UNUSUAL, "default"], found[DRIFT_USUAL, "default"]) < 8


def test_flags_and_drift_by_calibration(monkeypatch):
    telemetry = started()
    telemetry.observe_scores([score(4.0, 0.04), *[score(4.0, 0.5)] * 3, score(4.0, 0.9, "night")])
    found = values(telemetry)
    assert found[EXPECTED_FLAGS, "default"] == pytest.approx(4 * 0.05)
    assert found[OBSERVED_FLAGS, "default"] == 1 and found[OBSERVED_FLAGS, "night"] == 0
    assert (found[DRIFT_IMAGES, "default"], found[DRIFT_IMAGES, "night"]) == (4, 1)
    # At an alpha that so few images cannot decide on, nothing is expected.
    telemetry.observe_scores([(score(4.0, 0.01)[0], 0.001)])
    assert not values(telemetry).get((EXPECTED_FLAGS, "default"))
    versions = {"default": "ac12", "night": ""}
    telemetry.observe_calibrations(versions)
    found = values(telemetry)
    assert found[VERSION, "default"] == 0xAC12 and found[VERSION, "night"] == 0
    # From 0: Prometheus does not count what its first sample has.
    assert found[EXPECTED_FLAGS, "default"] == found[OBSERVED_FLAGS, "default"] == 0
    telemetry.observe_calibrations(versions)
    assert telemetry.collect() == []
    # A new release that did not come to serve may have written over it meanwhile, or what sums it
    # up was replaced.
    monkeypatch.setattr(time, "monotonic", lambda: math.inf)
    telemetry.observe_calibrations(versions)
    found = values(telemetry)
    assert found[VERSION, "default"] == 0xAC12 and (DRIFT_IMAGES, "night") in found
    assert found[INFO, "model@1", "onnxruntime/CPU"] == 1
    assert {key for key in found if key[0] in BPD.series} >= {(BPD.sum,), (BPD.count,)}


def test_requests_and_where_their_time_goes():
    telemetry = started()
    telemetry.observe_batch(
        [(200, ""), (200, ""), (415, "not_an_image")], 3, {"parse": 0.01, "compute": 0.05}
    )
    found = values(telemetry)
    assert found[REQUESTS, "200", "none"] == 2 and found[REQUESTS, "415", "not_an_image"] == 1
    assert found[IMAGES,] == 3
    assert found[STAGE_SECONDS, "compute"] == pytest.approx(0.15)
    assert found[SECONDS.bucket, "0.1"] == found[SECONDS.count,] == 3
    assert found[SECONDS.bucket, "0.05"] == 0
    assert found[BATCH.bucket, "4"] == 1 and found[BATCH.sum,] == 3
    assert telemetry.collect() == []
    telemetry.observe_batch([(200, "")], 1, {"compute": 0.2})
    assert (SECONDS.bucket, "0.1") not in values(telemetry)


def test_names_are_prometheus_names():
    assert len({m.name for m in METRICS}) == len(METRICS)
    assert all(m.name.replace("_", "a").isalpha() and m.name.startswith("ade_") for m in METRICS)
    assert {m.name.endswith("_total") for m in FAMILIES if m.kind == "counter"} == {True}
