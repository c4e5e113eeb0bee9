"""Tells the pool that a worker of TorchServe can compute, and once per second what it measured.

The connection ends with the worker's process, so that the pool learns of that too.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
from typing import Any

from handlers.service import wire
from handlers.service.worker import measurements
from serving.api.service import Service

logger = logging.getLogger(__name__)
SECONDS = 1.0
REPORTS_VARIABLE = "ADE_REPORTS"  # the pool's socket; a TorchServe without a pool has none


class Reporter:
    """The connection of this worker to its pool, if there is one."""

    def __init__(self, model_name: str) -> None:
        self._about = {"model": model_name, "worker": worker_name(), "pid": os.getpid()}
        self._connection: socket.socket | None = None
        if path := os.environ.get(REPORTS_VARIABLE):
            self._connection = socket.socket(socket.AF_UNIX)
            self._connection.connect(path)

    def fail(self, error: Exception) -> None:
        """Report that the worker cannot start."""
        self._send({"error": f"{type(error).__name__}: {error}"})

    def start(self, service: Service) -> None:
        """Report from now on, in a thread."""
        if self._connection is not None:
            self._send({"measurements": measurements(service)})
            threading.Thread(target=self._run, args=(service,), daemon=True).start()

    def _run(self, service: Service) -> None:
        while True:
            time.sleep(SECONDS)
            try:
                self._send({"measurements": measurements(service)})
            except OSError:  # the pool has ended, and TorchServe with it
                os._exit(1)
            except Exception:  # one failure must not end the thread
                logger.exception("the telemetry failed")

    def _send(self, head: dict[str, Any]) -> None:
        if self._connection is not None:
            self._connection.sendall(b"".join(wire.pack({**self._about, **head})))


def worker_name() -> str:
    """Return TorchServe's number of this worker, which stays the same after a restart.

    It is the end of the name of the worker's socket.
    """
    for option, value in zip(sys.argv, sys.argv[1:], strict=False):
        if option in ("--sock-name", "--port"):
            return value.rsplit(".", 1)[-1]
    return str(os.getpid())
