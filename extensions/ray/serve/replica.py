"""A replica that computes one operation of one bundle, a batch at a time."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ray import serve

from extensions.ray.serve.logs import open_log
from handlers.limits import RESPONSE_TIMEOUT_S
from handlers.service import wire
from handlers.service.worker import (
    WorkerSettings,
    answer_batch,
    load_service,
    measurements,
    pack_answers,
)

Told = tuple[str, list[Any], bytes]  # the worker's name, its measurements, and the answers


class Unhealthy(RuntimeError):
    """The replica should be replaced."""


class Replica:
    """A worker of :mod:`handlers.service`, called by Ray.

    Args:
        settings: what to compute; the name is completed by the replica's rank.
    """

    def __init__(self, settings: WorkerSettings) -> None:
        # By the rank, which a successor takes over, or each replica would leave files.
        self._rank = str(serve.get_replica_context().rank.rank)
        name = f"{settings.name.rpartition('-')[0]}-{self._rank}"
        logs = open_log(settings.logs, name)
        self._model = settings.model
        self._service = load_service(dataclasses.replace(settings, name=name, logs=str(logs)))
        self._thread = ThreadPoolExecutor(1, "compute")
        self._computing_since: float | None = None

    async def __call__(self, message: bytes) -> Told:
        """Compute a message of :mod:`handlers.service.wire`."""
        return await asyncio.get_running_loop().run_in_executor(
            self._thread, self._compute, message
        )

    def _compute(self, message: bytes) -> Told:
        self._computing_since = time.monotonic()
        try:
            answers = answer_batch(self._service, self._model, *wire.unpack(message))
            parts = pack_answers(answers)
            return self._rank, measurements(self._service), b"".join(parts)
        finally:
            self._computing_since = None

    async def describe(self) -> dict[str, Any]:
        """Its name among the workers of the model, and its process."""
        return {"worker": self._rank, "pid": os.getpid(), "host": socket.gethostname()}

    def check_health(self) -> None:
        """Called by Serve every few seconds; a replica that raises is replaced.

        Raises:
            Unhealthy: memory did not suffice for a request, or a batch does not end.
        """
        since = self._computing_since
        if self._service.is_exhausted:
            raise Unhealthy("a request did not fit into memory")
        if since is not None and time.monotonic() - since > RESPONSE_TIMEOUT_S:
            raise Unhealthy(f"a batch takes more than {RESPONSE_TIMEOUT_S} s")
