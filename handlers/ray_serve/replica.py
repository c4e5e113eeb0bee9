"""A replica that computes one operation of one bundle, a batch at a time, with one thread."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, cast

from ray import serve

from handlers.asgi.metrics import MODEL, QUEUE_SECONDS
from handlers.asgi.worker import WorkerSettings, answer_batch, load_service, measurements
from handlers.limits import MAX_BATCH, MAX_BATCH_DELAY_S, RESPONSE_TIMEOUT_S
from handlers.ray_serve.reporter import Measured, Reporter

# Status, headers and body, as they travel to the front.
Answered = tuple[int, list[tuple[str, str]], bytes]


class Job(NamedTuple):
    """A request on its way: what a worker is told of it, its body, and when it came."""

    about: dict[str, Any]
    body: bytes
    arrived: float


class Unhealthy(RuntimeError):
    """The replica should be replaced."""


class Replica:
    """Computes what the fronts send.

    Args:
        settings: what to compute; the name is completed by the replica's own.
        metrics: handle of :class:`handlers.ray_serve.reporter.MetricsReplica`.
    """

    def __init__(self, settings: WorkerSettings, metrics: Any) -> None:
        context = serve.get_replica_context()
        Path(settings.logs).mkdir(parents=True, exist_ok=True)
        self._model = settings.model
        self._of_model = {"model_name": settings.model, MODEL: settings.identity}
        self._labels = {**self._of_model, "worker": str(context.rank.rank)}
        name = f"{settings.name}-{context.replica_tag}"
        self._service = load_service(dataclasses.replace(settings, name=name))
        self._thread = ThreadPoolExecutor(1, "compute")
        self._computing_since: float | None = None
        self._queue_seconds = 0.0
        self._reporter = Reporter(metrics, self._measured)  # Serve calls this in its event loop

    async def __call__(self, about: dict[str, Any], body: bytes) -> Answered:
        """The answer to one request, computed with others."""
        batch: Any = self._batch  # called with one job, it is given many
        return cast(Answered, await batch(Job(about, body, time.monotonic())))

    async def ready(self) -> None:
        """Return, which shows a front that the replica can compute."""

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=MAX_BATCH_DELAY_S)  # type: ignore[untyped-decorator, unused-ignore]
    async def _batch(self, jobs: list[Job]) -> list[Answered]:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._compute, jobs)

    def _compute(self, jobs: list[Job]) -> list[Answered]:
        self._computing_since = now = time.monotonic()
        self._queue_seconds += sum(now - job.arrived for job in jobs if not job.about["probe"])
        try:
            answers = answer_batch(
                self._service,
                self._model,
                {"requests": [job.about for job in jobs]},
                [job.body for job in jobs],
            )
        finally:
            self._computing_since = None
        return [
            (a.status, [("content-type", a.content_type), *a.headers.items()], a.body)
            for a in answers
        ]

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

    def _measured(self) -> tuple[Measured, dict[str, int]]:
        seconds, self._queue_seconds = self._queue_seconds, 0.0
        measured: Measured = [
            (name, {**self._labels, **labels}, value)
            for name, labels, value in measurements(self._service)
        ]
        if seconds:
            measured.append((QUEUE_SECONDS.name, self._of_model, seconds))
        return measured, {}

    async def __del__(self) -> None:
        await self._reporter.stop()
