"""Metrics in Prometheus's text format, by its conventions."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

from handlers.front.front import Answer, Endpoint
from serving.api.telemetry import HistogramMetric, Metric
from serving.ingest.errors import ApiError

Family = Metric | HistogramMetric
REFUSALS = Metric(
    "ade_front_refusals_total",
    "counter",
    ("code",),
    "Requests that the front answered itself, and connections beyond the limit, by the code of "
    "the error.",
)
# By its usual name, which has no prefix.
START = Metric(
    "process_start_time_seconds",
    "gauge",
    about="When the process that counts started, in seconds since 1970.",
)
_STARTED = time.time()


def exposition(samples: Mapping[Family, Iterable[str]], refusals: Mapping[str, int]) -> str:
    """Each family with its help text and type.

    Args:
        samples: lines of each family; the start of this process is added.
        refusals: requests and connections that the front refused, by code.
    """
    counted = [
        f'{REFUSALS.name}{{code="{code}"}} {count}' for code, count in sorted(refusals.items())
    ]
    started = [f"{START.name} {_STARTED:.3f}"]
    return "".join(
        f"# HELP {family.name} {family.about}\n# TYPE {family.name} {family.kind}\n"
        + "".join(f"{line}\n" for line in lines)
        for family, lines in {START: started, **samples, REFUSALS: counted}.items()
        if lines
    )


def metrics_answer(text: str) -> Answer:
    """The answer to a scrape."""
    headers = [("content-type", "text/plain; version=0.0.4; charset=utf-8")]
    return Answer(200, headers, text.encode())


def only_metrics(endpoint: Endpoint, path: str) -> Endpoint:
    """Find the one endpoint of the port of the metrics, ``/metrics``.

    Raises:
        ApiError: 404, it is another path.
    """
    if path != "/metrics":
        raise ApiError(404, "not_found", "there is no such path; this port has /metrics")
    return endpoint
