"""Carries a worker's telemetry to TorchServe, which Prometheus scrapes: once a second, whatever the
load.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from ts.metrics.metric_type_enum import MetricTypes

from serving.api.telemetry import Telemetry

logger = logging.getLogger(__name__)
SECONDS = 1.0
COMMON_LABELS = ("model_name", "worker")
UNIT = "Count"
_KINDS = {"counter": MetricTypes.COUNTER, "gauge": MetricTypes.GAUGE}


class Reporter(threading.Thread):
    """A thread of a worker.

    Args:
        telemetry: what to report.
        cache: TorchServe's metrics, as ``context.metrics``; it knows those of the configuration.
        model_name: under which the model is served.
        also: called as often.
    """

    def __init__(
        self,
        telemetry: Telemetry,
        cache: Any,
        model_name: str,
        also: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(name="telemetry", daemon=True)
        self._telemetry = telemetry
        self._cache = cache
        self._also = also
        self._common = [model_name, worker_name()]

    def run(self) -> None:
        while True:
            time.sleep(SECONDS)
            self.report()
            self._also()

    def report(self) -> None:
        """Hand over what is new."""
        for measurement in self._telemetry.collect():
            try:
                metric = self._cache.get_metric(
                    measurement.metric.name, _KINDS[measurement.metric.kind]
                )
                metric.add_or_update(measurement.value, [*self._common, *measurement.labels])
            except Exception:  # one bad line must not end the others
                logger.exception("%s could not be reported", measurement.metric.name)


def worker_name() -> str:
    """The number that TorchServe gives a worker, the same after a restart: the end of its socket's
    name.
    """
    for option, value in zip(sys.argv, sys.argv[1:], strict=False):
        if option in ("--sock-name", "--port"):
            return value.rsplit(".", 1)[-1]
    return str(os.getpid())
