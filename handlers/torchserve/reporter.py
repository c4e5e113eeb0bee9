"""Passes a worker's telemetry on to TorchServe, which Prometheus scrapes, once per second."""

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
    """A thread that reports the telemetry of a worker.

    Args:
        telemetry: the measurements to report.
        cache: TorchServe's metrics, ``context.metrics``; it knows the configured ones.
        model_name: served name of the model.
        also: called after each report.
    """

    def __init__(
        self, telemetry: Telemetry, cache: Any, model_name: str, also: Callable[[], None]
    ) -> None:
        super().__init__(name="telemetry", daemon=True)
        self._telemetry = telemetry
        self._cache = cache
        self._also = also
        self._common = [model_name, worker_name()]

    def run(self) -> None:
        while True:
            time.sleep(SECONDS)
            for do in (self.report, self._also):
                try:
                    do()
                except Exception:  # one failure must not end the thread
                    logger.exception("the telemetry failed")

    def report(self) -> None:
        """Report all new measurements."""
        for measurement in self._telemetry.collect():
            try:
                metric = self._cache.get_metric(
                    measurement.metric.name, _KINDS[measurement.metric.kind]
                )
                metric.add_or_update(measurement.value, [*self._common, *measurement.labels])
            except Exception:  # one failure must not end the thread
                logger.exception("%s could not be reported", measurement.metric.name)


def worker_name() -> str:
    """Return TorchServe's number of this worker, which stays the same after a restart.

    It is the end of the name of the worker's socket.
    """
    for option, value in zip(sys.argv, sys.argv[1:], strict=False):
        if option in ("--sock-name", "--port"):
            return value.rsplit(".", 1)[-1]
    return str(os.getpid())
