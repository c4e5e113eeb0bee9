"""Sums of what workers measure, in Prometheus's text format; they outlast the workers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from serving.api.telemetry import BATCH, BPD, SECONDS

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
ANSWER_SECONDS = "ade_answer_seconds"  # from a request's arrival to its answer
QUEUE_SECONDS = "ade_queue_seconds"  # of these, before a worker took it
_HISTOGRAMS = {
    series: histogram.name
    for histogram in (SECONDS, BATCH, BPD)
    for series in (histogram.bucket.name, histogram.sum.name, histogram.count.name)
}
_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
Labels = tuple[tuple[str, str], ...]


class Metrics:
    """Values by name and labels."""

    def __init__(self) -> None:
        self._kinds: dict[str, str] = {}
        self._values: dict[str, dict[Labels, float]] = {}

    def update(self, name: str, kind: str, labels: Mapping[str, str], value: float) -> None:
        """Add to a counter, or set a gauge."""
        self._kinds[name] = kind
        values = self._values.setdefault(name, {})
        key = tuple(labels.items())
        values[key] = value + (values.get(key, 0.0) if kind == "counter" else 0.0)

    def text(self) -> str:
        """All of them; the series of a histogram stand together."""
        families: dict[str, list[str]] = {}
        for name in self._values:
            families.setdefault(_HISTOGRAMS.get(name, name), []).append(name)
        return "".join(
            f"# TYPE {family} {'histogram' if family not in names else self._kinds[family]}\n"
            + "".join(self._lines(names))
            for family, names in families.items()
        )

    def _lines(self, names: Iterable[str]) -> Iterable[str]:
        for name in names:
            for labels, value in self._values[name].items():
                inner = ",".join(f'{key}="{text.translate(_ESCAPES)}"' for key, text in labels)
                yield f"{name}{{{inner}}} {float(value)!r}\n"
