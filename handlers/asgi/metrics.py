"""Sums up the workers' measurements, beyond the life of a worker, in Prometheus's text format."""

from __future__ import annotations

from collections.abc import Mapping

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
_SERIES = {
    series.name: (family, series)
    for family in (*FAMILIES, ANSWER_SECONDS, QUEUE_SECONDS)
    for series in family.series
}
_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
Labels = tuple[tuple[str, str], ...]


class Metrics:
    """Values by name and labels.

    Args:
        refusals: requests that the front refused, by the error's code.
    """

    def __init__(self, refusals: Mapping[str, int]) -> None:
        self._refusals = refusals
        self._values: dict[str, dict[Labels, float]] = {}

    def update(self, name: str, labels: Mapping[str, str], value: float) -> None:
        """Add to a counter, or set a gauge.

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
            lines = samples.setdefault(_SERIES[name][0], [])
            for labels, value in values.items():
                inner = ",".join(f'{key}="{text.translate(_ESCAPES)}"' for key, text in labels)
                lines.append(f"{name}{{{inner}}} {float(value)!r}")
        return exposition(samples, self._refusals)
