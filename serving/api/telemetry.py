"""Measures a worker: its requests, their time by stage, bits per dimension, verdicts and drift.

Counters are reported as increments and gauges as values. The server of the worker passes them on to
where they are scraped.
"""

from __future__ import annotations

import contextlib
import functools
import math
import random
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from serving.engine.engine import Score
from serving.verdict.calibration import Verdict
from serving.verdict.calibration_file import CalibrationPair
from serving.verdict.drift import DriftMonitor
from serving.verdict.false_alarms import flagging_rank

STAGES = ("parse", "decode", "compute", "encode")
MAX_BPD = 1000.0
TELL_S = 5.0  # after which everything that lasts is reported again
INFINITY = float("inf")


@dataclass(frozen=True)
class Metric:
    """A metric: ``kind`` is Prometheus's type, ``about`` the help text.

    ``labels`` follow the labels of the model's name and of the worker.
    """

    name: str
    kind: Literal["counter", "gauge"]
    labels: tuple[str, ...] = ()
    about: str = ""

    @property
    def series(self) -> tuple[Metric, ...]:
        return (self,)


@dataclass(frozen=True)
class HistogramMetric:
    """A histogram as counters: of the values up to each bound, of their sum, of their number."""

    name: str
    bounds: tuple[float, ...]
    about: str
    kind: ClassVar = "histogram"

    @functools.cached_property
    def bucket(self) -> Metric:
        return Metric(f"{self.name}_bucket", "counter", ("le",))

    @functools.cached_property
    def sum(self) -> Metric:
        return Metric(f"{self.name}_sum", "counter")

    @functools.cached_property
    def count(self) -> Metric:
        return Metric(f"{self.name}_count", "counter")

    @property
    def series(self) -> tuple[Metric, ...]:
        return self.bucket, self.sum, self.count


REQUESTS = Metric(
    "ade_requests_total", "counter", ("status", "code"), "Requests answered by a worker."
)
IMAGES = Metric("ade_images_total", "counter", (), "Images computed.")
STAGE_SECONDS = Metric(
    "ade_stage_seconds_total",
    "counter",
    ("stage",),
    "Time that requests spent in a worker, by stage.",
)
STARTS = Metric(
    "ade_worker_starts_total", "counter", (), "Starts of a worker: one more than its restarts."
)
INFO = Metric("ade_info", "gauge", ("bundle", "backend"), "Bundle and backend, always 1.")
EXPECTED_FLAGS = Metric(
    "ade_gate_expected_flags_total",
    "counter",
    ("calibration",),
    "Images to be rejected, at most, if all are like the calibration images.",
)
OBSERVED_FLAGS = Metric(
    "ade_gate_observed_flags_total",
    "counter",
    ("calibration",),
    "Images rejected at the alphas of their requests.",
)
VERSION = Metric(
    "ade_gate_calibration_version",
    "gauge",
    ("calibration",),
    "The version of a calibration, its hexadecimal digits as a number; 0 if it judges nothing.",
)
DRIFT_IMAGES = Metric(
    "ade_drift_images", "gauge", ("calibration",), "Images with a verdict by this calibration."
)
DRIFT_UNUSUAL = Metric(
    "ade_drift_cusum_unusual",
    "gauge",
    ("calibration",),
    "Cumulative sum towards more unusual images.",
)
DRIFT_USUAL = Metric(
    "ade_drift_cusum_usual",
    "gauge",
    ("calibration",),
    "Cumulative sum towards less unusual images.",
)
DRIFT_DISTANCE = Metric(
    "ade_drift_ks",
    "gauge",
    ("calibration",),
    "Scaled Kolmogorov-Smirnov distance of the latest p-values from uniform.",
)
SECONDS = HistogramMetric(
    "ade_request_seconds",
    (0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, INFINITY),
    "Time in a worker, from parsing to the answer.",
)
BATCH = HistogramMetric(
    "ade_batch_images",
    (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 256.0, 1024.0, INFINITY),
    "Images computed together.",
)
BPD = HistogramMetric(
    "ade_bpd",
    (1.0, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 5.5, 6.0, 7.0, 8.0, 10.0, INFINITY),
    "Bits per dimension of scored images.",
)
FAMILIES: tuple[Metric | HistogramMetric, ...] = (
    REQUESTS,
    IMAGES,
    STAGE_SECONDS,
    STARTS,
    INFO,
    EXPECTED_FLAGS,
    OBSERVED_FLAGS,
    VERSION,
    DRIFT_IMAGES,
    DRIFT_UNUSUAL,
    DRIFT_USUAL,
    DRIFT_DISTANCE,
    SECONDS,
    BATCH,
    BPD,
)
METRICS = tuple(metric for family in FAMILIES for metric in family.series)


@dataclass(frozen=True)
class Measurement:
    """A value of one metric, with the values of its own labels."""

    metric: Metric
    value: float
    labels: tuple[str, ...] = ()


class Stopwatch:
    """Seconds of one batch, by stage."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - started


class _Histogram:
    """Values since the last report."""

    def __init__(self, metric: HistogramMetric) -> None:
        self.metric = metric
        self._buckets = [0] * len(metric.bounds)
        self._sum = 0.0
        self._told = False

    def add(self, value: float, times: int = 1) -> None:
        self._sum += value * times
        for i, bound in enumerate(self.metric.bounds):
            if value <= bound:
                self._buckets[i] += times

    def collect(self, again: bool) -> list[Measurement]:
        """What is new; if ``again``, all buckets, unless there was never a value.

        So it is the first time: a histogram without its lowest buckets, even if they are empty, has
        other quantiles.
        """
        if not self._buckets[-1] and not (again and self._told):
            return []
        found = [
            Measurement(self.metric.bucket, count, (_le(bound),))
            for bound, count in zip(self.metric.bounds, self._buckets, strict=True)
            if count or again or not self._told
        ]
        found += [
            Measurement(self.metric.sum, self._sum),
            Measurement(self.metric.count, self._buckets[-1]),
        ]
        self._buckets = [0] * len(self._buckets)
        self._sum = 0.0
        self._told = True
        return found


def _le(bound: float) -> str:
    return "+Inf" if bound == INFINITY else f"{bound:g}"


@dataclass
class _Stream:
    """The verdicts by one version of a calibration."""

    version: str
    drift: DriftMonitor
    has_moved: bool = True

    def collect(self, name: str) -> list[Measurement]:
        self.has_moved = False
        return [
            Measurement(DRIFT_IMAGES, self.drift.images, (name,)),
            Measurement(DRIFT_UNUSUAL, self.drift.unusual, (name,)),
            Measurement(DRIFT_USUAL, self.drift.usual, (name,)),
            Measurement(DRIFT_DISTANCE, self.drift.distance(), (name,)),
        ]


class Telemetry:
    """The telemetry of one worker. One thread may read it while another feeds it.

    Args:
        model_id: name and hash of the bundle.
        backend: name of the backend.
        judges: whether its operation gives verdicts.
    """

    def __init__(self, model_id: str, backend: str, judges: bool) -> None:
        self._lock = threading.Lock()
        self._judges = judges
        self._info = (INFO, (model_id, backend))
        self._streams: dict[str, _Stream] = {}
        self._tell_all = -math.inf  # when everything that lasts is reported again
        self._tells_all = False
        self._counts: Counter[tuple[Metric, tuple[str, ...]]] = Counter()
        self._counts[STARTS, ()] = 1
        self._gauges: dict[tuple[Metric, tuple[str, ...]], float] = {self._info: 1.0}
        self._seconds, self._batch, self._bpd = map(_Histogram, (SECONDS, BATCH, BPD))

    def observe_batch(
        self, answers: Iterable[tuple[int, str]], images: int, stages: dict[str, float]
    ) -> None:
        """Count a batch of requests.

        Args:
            answers: status and error code (empty where none) of each.
            images: number of images that were computed.
            stages: seconds by stage; each request waited for all of them.
        """
        with self._lock:
            count = 0
            for status, code in answers:
                self._counts[REQUESTS, (str(status), code or "none")] += 1
                count += 1
            self._counts[IMAGES, ()] += images
            for stage, seconds in stages.items():
                self._counts[STAGE_SECONDS, (stage,)] += seconds * count  # type: ignore[assignment]
            self._seconds.add(sum(stages.values()), count)
            self._batch.add(images)

    def observe_scores(self, scores: Iterable[tuple[Score, float]]) -> None:
        """Count scores, each with its request's alpha.

        Scores without a verdict count neither for drift nor as flags.
        """
        with self._lock:
            for score, alpha in scores:
                # Counters must not fall, and one image must not dominate the sum.
                self._bpd.add(min(max(score.bpd, 0.0), MAX_BPD))
                if score.verdict is not None:
                    self._observe(score.verdict, score.calibrations, alpha)

    def _observe(self, verdict: Verdict, calibrations: CalibrationPair, alpha: float) -> None:
        name = calibrations.name
        stream = self._streams.get(name)
        if stream is None or stream.version != calibrations.version:
            # Sums over p-values of two versions would mean nothing.
            stream = self._streams[name] = _Stream(calibrations.version, DriftMonitor())
        stream.drift.update(random.uniform(verdict.beyond, verdict.p_value))
        stream.has_moved = True
        rank = flagging_rank(verdict.calibrated, alpha)
        if rank:  # otherwise there is no decision
            expected = rank / (verdict.calibrated + 1)
            self._counts[EXPECTED_FLAGS, (name,)] += expected  # type: ignore[assignment]
            self._counts[OBSERVED_FLAGS, (name,)] += verdict.p_value <= alpha

    def observe_calibrations(self, versions: Mapping[str, str]) -> None:
        """Report the versions of all calibrations.

        The first call reports all of them, and later ones from time to time all that lasts, because
        a release that did not come to serve may have written over it, or what sums it up was
        replaced.

        Args:
            versions: by name; they do not change.
        """
        with self._lock:
            now = time.monotonic()
            if now < self._tell_all:
                return
            self._tell_all, self._tells_all = now + TELL_S, True
            self._gauges[self._info] = 1.0
            for stream in self._streams.values():
                stream.has_moved = True
            for name, version in versions.items():
                self._gauges[VERSION, (name,)] = float(int(version or "0", 16))
                if self._judges:  # from 0, or Prometheus would not count what its first sample has
                    self._counts[EXPECTED_FLAGS, (name,)] += 0
                    self._counts[OBSERVED_FLAGS, (name,)] += 0

    def collect(self) -> list[Measurement]:
        """Measurements that changed since the last call."""
        with self._lock:
            found = [
                Measurement(metric, value, labels)
                for (metric, labels), value in self._counts.items()
                if value or metric in (EXPECTED_FLAGS, OBSERVED_FLAGS)
            ]
            found += [
                Measurement(metric, value, labels)
                for (metric, labels), value in self._gauges.items()
            ]
            for histogram in (self._seconds, self._batch, self._bpd):
                found += histogram.collect(self._tells_all)
            for name, stream in self._streams.items():
                if stream.has_moved:
                    found += stream.collect(name)
            self._counts.clear()
            self._gauges.clear()
            self._tells_all = False
            return found
