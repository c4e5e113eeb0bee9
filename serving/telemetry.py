"""What a worker tells of the images it scores: their bits as a histogram, and whether the stream drifts.

Counters are given as increments and gauges as they stand; whoever runs the worker carries them to where they are scraped.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from serving.drift import DriftMonitor
from serving.engine import Score

MAX_BPD = 1000.0
BPD_BOUNDS = (1.0, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 5.5, 6.0, 7.0, 8.0, 10.0, float("inf"))


@dataclass(frozen=True)
class Metric:
    """``kind`` is Prometheus's; ``labels`` come after the model's name and the worker's."""

    name: str
    kind: Literal["counter", "gauge"]
    labels: tuple[str, ...] = ()


BUCKET = Metric("ade_bpd_bucket", "counter", ("le",))  # with the next two, a histogram in Prometheus's form
SUM = Metric("ade_bpd_sum", "counter")
COUNT = Metric("ade_bpd_count", "counter")
DRIFT_IMAGES = Metric("ade_drift_images", "gauge")
DRIFT_STRANGE = Metric("ade_drift_cusum_strange", "gauge")
DRIFT_USUAL = Metric("ade_drift_cusum_usual", "gauge")
DRIFT_DISTANCE = Metric("ade_drift_ks", "gauge")
METRICS = (BUCKET, SUM, COUNT, DRIFT_IMAGES, DRIFT_STRANGE, DRIFT_USUAL, DRIFT_DISTANCE)


@dataclass(frozen=True)
class Measurement:
    """A value of one metric, with the values of its own labels."""

    metric: Metric
    value: float
    labels: tuple[str, ...] = ()


def _le(bound: float) -> str:
    return "+Inf" if bound == float("inf") else f"{bound:g}"


class ScoreTelemetry:
    """Of one worker that scores; may be read by another thread than the one that feeds it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._drift = DriftMonitor()
        self._buckets: Counter[str] = Counter()
        self._sum = 0.0
        self._count = 0

    def observe(self, scores: Iterable[tuple[Score, bool]]) -> None:
        """Take in scores; with each whether its verdict counts, as that of a resized image may not."""
        with self._lock:
            for score, counts in scores:
                self._count += 1
                self._sum += min(max(score.bpd, 0.0), MAX_BPD)  # a counter never falls, nor is it to be one image's
                self._buckets.update(_le(bound) for bound in BPD_BOUNDS if score.bpd <= bound)
                if counts and score.verdict is not None:
                    self._drift.update(score.verdict.uniform)

    def collect(self) -> list[Measurement]:
        """What is new since the last call; empty if nothing is."""
        with self._lock:
            if not self._count:
                return []
            # All of them, zeros too: without its lowest buckets a histogram would have other quantiles.
            found = [Measurement(BUCKET, self._buckets[le], (le,)) for le in map(_le, BPD_BOUNDS)]
            found += [Measurement(SUM, self._sum), Measurement(COUNT, self._count)]
            if self._drift.images:
                found += [Measurement(DRIFT_IMAGES, self._drift.images), Measurement(DRIFT_STRANGE, self._drift.strange),
                          Measurement(DRIFT_USUAL, self._drift.usual),
                          Measurement(DRIFT_DISTANCE, self._drift.distance())]
            self._buckets.clear()
            self._sum, self._count = 0.0, 0
            return found
