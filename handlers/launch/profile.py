"""Computes the mean milliseconds per request and stage from the service's metrics."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping

from serving.api.telemetry import IMAGES, REQUESTS, STAGE_SECONDS, STAGES

_LINE = re.compile(r"^(\w+)\{([^}]*)\} (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')

Totals = dict[str, dict[str, float]]
# An engine's counters of seconds, and the time that each counts: ``whole``, from the arrival of a
# request to its answer, or ``queue``.
Timers = Mapping[str, str]


def read_totals(metrics: str, timers: Timers) -> Totals:
    """Read totals since the start per served model: ``requests``, ``images``, seconds by stage.

    Args:
        metrics: the text that Prometheus scrapes.
        timers: those of the engine.
    """
    found: Totals = defaultdict(lambda: defaultdict(float))
    for name, labels, value in _LINE.findall(metrics):
        named = dict(_LABEL.findall(labels))
        mine = found[named.get("model_name", "")]
        if name == REQUESTS.name:
            mine["requests"] += float(value)
        elif name == IMAGES.name:
            mine["images"] += float(value)
        elif name == STAGE_SECONDS.name:
            mine[named["stage"]] += float(value)
        elif name in timers:
            mine[timers[name]] += float(value)
    return {model: dict(values) for model, values in found.items() if "requests" in values}


def profile_table(before: Totals, after: Totals) -> str:
    """Format a table with one line per model that had requests in between; empty if none had.

    ``queue`` is the wait for a worker, ``carry`` the remaining time: transport to the worker and
    back.
    """
    columns = ("queue", *STAGES, "carry", "whole")
    lines = []
    for model, values in after.items():
        old = before.get(model, {})
        if any(values.get(key, 0.0) < value for key, value in old.items()):
            old = {}  # an upgrade has ended: the counters of the bundle before are gone
        new = {key: value - old.get(key, 0.0) for key, value in values.items()}
        if new.get("requests", 0) < 1:
            continue
        new["carry"] = new.get("whole", 0.0) - sum(
            new.get(stage, 0.0) for stage in ("queue", *STAGES)
        )
        times = "".join(
            f"{1000 * new.get(column, 0.0) / new['requests']:9.2f}" for column in columns
        )
        lines.append(f"{model:14}{new['requests']:9.0f}{new.get('images', 0):9.0f}{times}")
    if not lines:
        return ""
    head = "ms per request" + "".join(f"{column:>9}" for column in ("requests", "images", *columns))
    return "\n".join([head, *lines])
