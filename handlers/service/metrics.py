"""Sums up the workers' measurements, beyond the life of a worker, in Prometheus's text format."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping

from handlers.front.exposition import Family, exposition
from serving.api.telemetry import FAMILIES, Metric

ANSWER_SECONDS = Metric(
    "ade_answer_seconds_total",
    "counter",
    about="Time from the arrival of requests at the front to their answers.",
)
QUEUE_SECONDS = Metric(
    "ade_queue_seconds_total", "counter", about="Time that requests waited for a worker."
)
FAILURES = Metric(
    "ade_worker_failures_total",
    "counter",
    ("code",),
    "Requests that no worker answered, because one ended or hung.",
)
_SERIES = {
    series.name: (family, series)
    for family in (*FAMILIES, ANSWER_SECONDS, QUEUE_SECONDS, FAILURES)
    for series in family.series
}
_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
MODEL = "bundle"  # the label that tells two releases apart, as in ade_info
Labels = tuple[tuple[str, str], ...]


class Metrics:
    """Values by name and labels.

    Args:
        refusals: requests that the front refused, by the error's code.
    """

    def __init__(self, refusals: Mapping[str, int]) -> None:
        self._refusals = refusals
        self._values: dict[str, dict[Labels, float]] = {}
        self._models: Counter[str] = Counter()

    @contextlib.contextmanager
    def of_models(self, models: Collection[str]) -> Iterator[None]:
        """Keep the values of models for the block, or for longer if another block has them too.

        Args:
            models: values of the label :data:`MODEL`.
        """
        self._models.update(models)
        try:
            yield
        finally:
            self._models.subtract(models)
            gone = {model for model in models if not self._models[model]}
            for values in self._values.values():
                for labels in [one for one in values if dict(one).get(MODEL) in gone]:
                    del values[labels]

    def drop_gauges(self, labels: Mapping[str, str]) -> None:
        """Drop the gauges of a worker that ended.

        Args:
            labels: that all measurements of the worker have.
        """
        for name, values in self._values.items():
            if _SERIES[name][1].kind == "gauge":
                for key in [one for one in values if labels.items() <= dict(one).items()]:
                    del values[key]

    def drop_gauge(self, name: str, labels: Mapping[str, str]) -> None:
        """Drop a single value, unless it is a counter's."""
        if _SERIES[name][1].kind == "gauge":
            self._values.get(name, {}).pop(tuple(labels.items()), None)

    def update(self, name: str, labels: Mapping[str, str], value: float) -> None:
        """Add to a counter, or set a gauge.

        Args:
            name: of the metric.
            labels: with :data:`MODEL` among them.
            value: to add, or of the gauge.

        Raises:
            KeyError: there is no metric of this name.
        """
        is_counter = _SERIES[name][1].kind == "counter"
        values = self._values.setdefault(name, {})
        key = tuple(labels.items())
        values[key] = value + (values.get(key, 0.0) if is_counter else 0.0)

    def text(self) -> str:
        """All of them by family."""
        samples: dict[Family, list[str]] = {}
        for name, values in self._values.items():
            if not values:
                continue
            lines = samples.setdefault(_SERIES[name][0], [])
            for labels, value in values.items():
                inner = ",".join(f'{key}="{text.translate(_ESCAPES)}"' for key, text in labels)
                lines.append(f"{name}{{{inner}}} {float(value)!r}")
        return exposition(samples, self._refusals)
