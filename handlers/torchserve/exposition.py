"""Rewrites TorchServe's metrics by Prometheus's conventions.

TorchServe has only counters and gauges, gives all of them one help text, counts microseconds, and
adds gauges that describe only the last request. The front, through which every scrape passes, turns
counters into histograms, adds types and help texts, converts units and drops those gauges.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from handlers.front.exposition import Family, exposition
from serving.api.telemetry import FAMILIES, Metric

LATENCY = Metric(
    "ts_inference_latency_seconds_total",
    "counter",
    about="Time from the arrival of requests at TorchServe to their answers.",
)
QUEUE = Metric(
    "ts_queue_latency_seconds_total", "counter", about="Time that requests waited for a worker."
)
INFERENCES = Metric(
    "ts_inference_requests_total", "counter", about="Requests that TorchServe took for a worker."
)
RESPONSES = Metric(
    "ts_responses_total",
    "counter",
    ("class",),
    "Answers of TorchServe and its workers, by the class of the status.",
)

_SAMPLE = re.compile(r"(\w+)\{(.*?),?\} (\S+)")


@dataclass(frozen=True)
class _Source:
    """How one of TorchServe's metrics is rewritten."""

    family: Family
    name: str
    label: str = ""  # to add
    factor: float = 1.0


_SOURCES = {
    **{
        series.name: _Source(family, series.name)
        for family in (*FAMILIES, INFERENCES)
        for series in family.series
    },
    **{
        f"Requests{digit}XX": _Source(RESPONSES, RESPONSES.name, f'class="{digit}xx",')
        for digit in "245"
    },
    "ts_inference_latency_microseconds": _Source(LATENCY, LATENCY.name, factor=1e-6),
    "ts_queue_latency_microseconds": _Source(QUEUE, QUEUE.name, factor=1e-6),
}


def by_convention(text: str, refusals: Mapping[str, int]) -> str:
    """Rewrite what TorchServe exposes.

    Args:
        text: metrics in Prometheus's text format.
        refusals: requests that the front refused, by code.
    """
    samples: dict[Family, list[str]] = {}
    for line in text.splitlines():
        found = _SAMPLE.fullmatch(line)
        source = _SOURCES.get(found[1]) if found else None
        if found is None or source is None:
            continue
        value = found[3] if source.factor == 1 else f"{float(found[3]) * source.factor:.9g}"
        samples.setdefault(source.family, []).append(
            f"{source.name}{{{source.label}{found[2]}}} {value}"
        )
    return exposition(samples, refusals)
