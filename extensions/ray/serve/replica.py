"""A replica that computes one operation of one bundle, a batch at a time, with one thread."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from ray import serve

from extensions.ray.serve.calls import Answered, Asked
from extensions.ray.serve.logs import open_log
from extensions.ray.serve.reporter import Measured, Reporter
from extensions.ray.serve.scaling import REQUESTS, WAITING
from handlers.limits import RESPONSE_TIMEOUT_S
from handlers.service.batches import BatchQueue
from handlers.service.metrics import MODEL, QUEUE_SECONDS
from handlers.service.worker import WorkerSettings, answer_batch, load_service, measurements
from serving.api.telemetry import STARTS

logger = logging.getLogger(__name__)
HEARD_S = 15.0  # after which what a front told is outdated; it looks more often


class Job(NamedTuple):
    """A request, when it came, and the future of its answer."""

    asked: Asked
    arrived: float
    answer: asyncio.Future[Answered]

    @property
    def num_bytes(self) -> int:
        """The size of its body."""
        return len(self.asked.body)


class Unhealthy(RuntimeError):
    """The replica should be replaced."""


class Replica:
    """Computes what the fronts send.

    Args:
        settings: what to compute; the name is completed by the replica's rank.
        metrics: handle of :class:`extensions.ray.serve.reporter.MetricsReplica`.
    """

    def __init__(self, settings: WorkerSettings, metrics: Any) -> None:
        context = serve.get_replica_context()
        # By the rank, which a successor takes over, or each replica would leave files. After a
        # downscale Serve may give a rank again that a living replica had when it started: then two
        # share a log and a journal, and the gauges of one hide those of the other.
        name = f"{settings.name}-{context.rank.rank}"
        logs = open_log(settings.logs, name)
        self._model = settings.model
        self._of_model = {"model_name": settings.model, MODEL: settings.identity}
        self._labels = {**self._of_model, "worker": str(context.rank.rank)}
        self._service = load_service(dataclasses.replace(settings, name=name, logs=str(logs)))
        self._thread = ThreadPoolExecutor(1, "compute")
        self._waiting: BatchQueue[Job] = BatchQueue()
        self._requests = 0
        self._fronts: dict[str, tuple[float, int]] = {}  # when they told how many requests wait
        self._computing_since: float | None = None
        self._queue_seconds = 0.0
        # Serve calls this in its event loop.
        self._reporter = Reporter(metrics, self._measured)
        self._computing = asyncio.create_task(self._compute_all())

    async def __call__(self, call: list[Asked]) -> list[Answered | None]:
        """The answer to each request of a call, ``None`` if it could not be computed."""
        loop, now = asyncio.get_running_loop(), time.monotonic()
        jobs = [Job(asked, now, loop.create_future()) for asked in call]
        self._requests += len(jobs)
        try:
            self._waiting.put(*jobs)
            answers = await asyncio.gather(*(job.answer for job in jobs), return_exceptions=True)
        finally:
            self._requests -= len(jobs)
        return [None if isinstance(answer, BaseException) else answer for answer in answers]

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve every few seconds, for :mod:`extensions.ray.serve.scaling`."""
        since = time.monotonic() - HEARD_S
        self._fronts = {f: told for f, told in self._fronts.items() if told[0] > since}
        waiting = {WAITING + front: float(n) for front, (_, n) in self._fronts.items()}
        return {REQUESTS: float(self._requests), **waiting}

    async def ready(self, front: str, num_waiting: int) -> None:
        """Return, which shows a front that the replica can compute.

        Args:
            front: an id of it.
            num_waiting: requests of this model that wait there.
        """
        self._fronts[front] = (time.monotonic(), num_waiting)

    async def _compute_all(self) -> None:
        """Compute what waits, a batch at a time.

        ``serve.batch`` collects its batches before the replica is free for them: they had one
        request each under load, which doubled the time for an image.
        """
        loop = asyncio.get_running_loop()
        while True:
            batch = await self._waiting.next_batch()
            try:
                answers = await loop.run_in_executor(self._thread, self._compute, batch)
            except Exception as error:  # which the front makes a 503 of
                logger.exception("a batch failed")
                for job in batch:
                    if not job.answer.done():
                        job.answer.set_exception(error)
                continue
            for job, answered in zip(batch, answers, strict=True):
                if not job.answer.done():
                    job.answer.set_result(answered)

    def _compute(self, jobs: list[Job]) -> list[Answered]:
        self._computing_since = now = time.monotonic()
        self._queue_seconds += sum(
            now - job.arrived for job in jobs if not job.asked.about["probe"]
        )
        try:
            answers = answer_batch(
                self._service,
                self._model,
                {"requests": [job.asked.about for job in jobs]},
                [job.asked.body for job in jobs],
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
            if name != STARTS.name  # Serve starts and stops replicas as the load changes
        ]
        if seconds:
            measured.append((QUEUE_SECONDS.name, self._of_model, seconds))
        return measured, {}

    async def __del__(self) -> None:
        self._computing.cancel()
        await self._reporter.stop()
