"""What the engines have in common: the queue of a model, what its workers measure, and a pool.

A pool is the processes of one release. The application asks its models, and knows no engine.
"""

from __future__ import annotations

import abc
import asyncio
import dataclasses
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

from handlers.front.front import Answer, Request
from handlers.service import wire
from handlers.service.batches import BatchQueue
from handlers.service.metrics import ANSWER_SECONDS, FAILURES, MODEL, QUEUE_SECONDS, Metrics
from handlers.service.worker import WorkerSettings
from serving.api.telemetry import STARTS, Metric
from serving.ingest.errors import ApiError, no_answer, stopping, worker_died

PAUSE_S = 0.1  # before a process is replaced; doubled each time until one is ready
MAX_PAUSE_S = 10.0
# One thread per process: several would compete for the cores and change the order of sums.
VARIABLES = {"OMP_NUM_THREADS": "1", "NVIDIA_TF32_OVERRIDE": "0"}
Ask = Callable[[list[wire.Body]], Awaitable[wire.Message]]


class WorkerError(RuntimeError):
    """A worker's process ended, hangs, or gave an invalid answer."""


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """A request with the future of its answer; ``v2`` as in the model."""

    request: Request
    id: str
    v2: int | None
    answer: asyncio.Future[Answer]

    @property
    def num_bytes(self) -> int:
        """The size of its body."""
        return len(self.request.body)

    def fail(self, error: ApiError) -> None:
        """Answer an error if the client still waits."""
        if not self.answer.done():
            self.answer.set_exception(error)


class Worker(Protocol):
    """A worker as the model sees it."""

    @property
    def is_ready(self) -> bool:
        """Whether it can compute."""

    def describe(self) -> dict[str, Any]:
        """The process id and the state, as for ``ade status``."""


class PooledModel:
    """A model, the queue before its workers, and their measurements.

    Args:
        name: name of the model in metrics and logs.
        settings: settings of each worker.
        metrics: takes the measurements.
        timeout_s: time for an answer, including the queue.
        metadata: the model's metadata of the Open Inference Protocol.

    Attributes:
        identity: of the model, ``NAME@HASH``.
        num_workers: whether they run or are being started again.
        workers: those that the pool has started.
    """

    def __init__(
        self,
        name: str,
        settings: list[WorkerSettings],
        metrics: Metrics,
        timeout_s: float,
        metadata: dict[str, Any],
    ) -> None:
        self.name = name
        self.metadata = metadata
        self.settings = settings
        self.identity = settings[0].identity
        self.num_workers = len(settings)
        self.workers: list[Worker] = []
        self.waiting: BatchQueue[Job] = BatchQueue()
        self._metrics = metrics
        self._timeout_s = timeout_s
        self._is_stopping = False

    @property
    def is_ready(self) -> bool:
        """Whether a worker is ready."""
        return any(worker.is_ready for worker in self.workers)

    def describe(self) -> dict[str, Any]:
        """The workers' processes and the number of requests that wait, as for ``ade status``."""
        return {
            "workers": [worker.describe() for worker in self.workers],
            "queued": len(self.waiting),
        }

    def refuse(self) -> None:
        """Answer 503 to requests that wait for a worker and to all further ones."""
        self._is_stopping = True
        for job in self.waiting.clear():
            job.fail(stopping())

    async def answer(self, request: Request, v2: int | None = None) -> Answer:
        """The answer to a request.

        Args:
            request: of the API, or of the Open Inference Protocol.
            v2: number of bytes of JSON in a body of that protocol.

        Raises:
            ApiError: 503, a worker died over it or it took too long.
        """
        if self._is_stopping:
            raise stopping()
        loop = asyncio.get_running_loop()
        job = Job(request, str(uuid.uuid4()), v2, loop.create_future())
        self.waiting.put(job)
        timer = loop.call_later(self._timeout_s, job.fail, no_answer())
        try:
            return await job.answer
        except ApiError as error:
            if not self._is_stopping and not request.is_probe:
                self._count(FAILURES, 1.0, code=error.code)
            raise
        finally:
            timer.cancel()
            if not request.is_probe:
                self._count(ANSWER_SECONDS, time.perf_counter() - request.arrived)

    async def next_batch(
        self, gone: asyncio.Future[Any], seconds: float | None = None
    ) -> list[Job]:
        """The next batch for a worker; empty if no request came for a while.

        Args:
            gone: done when the worker has ended.
            seconds: to wait for a request; for ever unless given.

        Raises:
            WorkerError: the worker ended meanwhile; no waiting request is lost.
        """
        waiting = asyncio.create_task(self.waiting.next_batch())
        try:
            await asyncio.wait(
                (waiting, gone), timeout=seconds, return_when=asyncio.FIRST_COMPLETED
            )
            if gone.done():
                raise WorkerError("its process ended")
        except BaseException:
            if waiting.done():
                self.waiting.put(*waiting.result())
            waiting.cancel()
            raise
        if waiting.done():
            return waiting.result()
        waiting.cancel()
        return []

    async def compute(self, batch: list[Job], ask: Ask) -> wire.Head:
        """Have a batch computed; returns the head of the worker's message.

        Args:
            batch: of requests.
            ask: sends a message to a worker and returns its answer. It may raise an ``ApiError``
                for all requests.

        Raises:
            WorkerError: there is no valid answer, so all requests get an error.
        """
        now = time.perf_counter()  # uvloop's own clock counts milliseconds
        waited = [now - job.request.arrived for job in batch if not job.request.is_probe]
        if waited:
            self._count(QUEUE_SECONDS, sum(waited))
        about = [
            {
                "id": job.id,
                "content_type": job.request.content_type,
                "probe": job.request.is_probe,
                "v2": job.v2,
            }
            for job in batch
        ]
        try:
            parts = wire.pack({"requests": about}, [job.request.body for job in batch])
            head, bodies = await ask(parts)
            for job, given, body in zip(batch, head["answers"], bodies, strict=True):
                headers = [("content-type", given["content_type"]), *given["headers"].items()]
                if not job.answer.done():
                    job.answer.set_result(
                        Answer(given["status"], [*headers, ("x-request-id", job.id)], body)
                    )
        except Exception as error:  # an invalid message can raise anything, a large one MemoryError
            for job in batch:
                job.fail(error if isinstance(error, ApiError) else worker_died())
            raise WorkerError(str(error) or repr(error)) from None
        except asyncio.CancelledError:  # the pool is stopped
            for job in batch:
                job.fail(stopping())
            raise
        return head

    def measure(self, worker: str, head: wire.Head) -> None:
        """Add the measurements of a worker's message.

        Raises:
            WorkerError: they are invalid.
        """
        try:
            for name, labels, value in head["measurements"]:
                self._metrics.update(name, self._labels(worker, labels), float(value))
        except (KeyError, TypeError, ValueError) as error:
            raise WorkerError(f"its measurements are invalid: {error!r}") from None

    def count_failed_start(self, worker: str) -> None:
        """Count a start that the worker does not report."""
        self._metrics.update(STARTS.name, self._labels(worker), 1.0)

    def drop_gauges(self, worker: str) -> None:
        """Drop the gauges of a worker that ended: the next does not know all that it reported.

        A worker of another release that has the same labels reports its own again.
        """
        self._metrics.drop_gauges(self._labels(worker))

    def _labels(self, worker: str, labels: dict[str, str] | None = None) -> dict[str, str]:
        common = {"model_name": self.name, "worker": worker}
        return {**common, **(labels or {}), MODEL: self.identity}

    def _count(self, metric: Metric, value: float, **labels: str) -> None:
        common = {"model_name": self.name, **labels, MODEL: self.identity}
        self._metrics.update(metric.name, common, value)


class Pool(abc.ABC):
    """The processes of a release: within the block its models can answer.

    An engine is a subclass with :meth:`start` and :meth:`stop`, which
    :data:`handlers.launch.engines.ENGINES` names.

    Args:
        models: of the release.
        folder: for files; it does not exist yet, or is of a pool that was killed.
    """

    def __init__(self, models: Sequence[PooledModel], folder: Path) -> None:
        self.models = models
        self.folder = folder

    @abc.abstractmethod
    async def start(self) -> None:
        """Start the processes, and wait until all workers can compute.

        Raises:
            WorkerError: one cannot be started.
        """

    @abc.abstractmethod
    async def stop(self) -> None:
        """Kill what was started. What is being computed is answered 503."""

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()
        self.refuse()

    @property
    def is_ready(self) -> bool:
        """Whether every model has a worker that is ready."""
        return all(model.is_ready for model in self.models)

    def refuse(self) -> None:
        """Answer 503 to requests that wait for a worker and to all further ones."""
        for model in self.models:
            model.refuse()

    def describe(self) -> dict[str, Any]:
        """Workers and queue by model, as ``ade status`` shows them."""
        return {model.name: model.describe() for model in self.models}
