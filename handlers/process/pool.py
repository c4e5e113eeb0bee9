"""Runs the worker processes of one model, gives them batches, and replaces those that end.

Native code that crashes ends only its own process.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import socket
import sys
import time
import uuid
from collections.abc import Iterator
from typing import Any

from handlers.front.front import Answer, Request
from handlers.limits import RESPONSE_TIMEOUT_S, STARTUP_TIMEOUT_S
from handlers.processes.environment import child_environment
from handlers.service import wire
from handlers.service.batches import BatchQueue
from handlers.service.metrics import ANSWER_SECONDS, FAILURES, MODEL, QUEUE_SECONDS, Metrics
from handlers.service.worker import WorkerSettings
from serving.api.telemetry import STARTS, Metric
from serving.ingest.errors import ApiError, no_answer, stopping, worker_died

logger = logging.getLogger(__name__)
PAUSE_S = 0.1  # before a process is replaced; doubled each time until one is ready
MAX_PAUSE_S = 10.0
# One thread per process: several would compete for the cores and change the order of sums.
VARIABLES = {"OMP_NUM_THREADS": "1", "NVIDIA_TF32_OVERRIDE": "0"}
# After which an idle worker gets an empty batch, and reports what lasts again.
IDLE_S = 5.0
BUFFER_BYTES = 2**20
WORKER = "handlers.service.worker"


class WorkerError(RuntimeError):
    """A worker's process ended, hangs, or gave an invalid answer."""


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """A request with the future of its answer; ``v2`` as in the pool."""

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


class Pool:
    """The workers of one model, and the queue before them.

    Args:
        name: name of the model in metrics and logs.
        settings: settings of each worker.
        metrics: takes the measurements.
        timeout_s: time for an answer, including the queue.
        metadata: the model's metadata of the Open Inference Protocol.

    Attributes:
        identity: of the model, ``NAME@HASH``.
        num_workers: whether they run or are being started again.
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
        self.metrics = metrics
        self.identity = settings[0].identity
        self.num_workers = len(settings)
        self._timeout_s = timeout_s
        self.waiting: BatchQueue[Job] = BatchQueue()
        self._workers = [_Worker(self, one) for one in settings]
        self._tasks: list[asyncio.Task[None]] = []
        self._is_stopping = False

    @property
    def is_ready(self) -> bool:
        """Whether a worker is ready."""
        return any(worker.is_ready for worker in self._workers)

    async def start(self) -> None:
        """Start all workers and wait until they can compute; :meth:`stop` ends them in any case.

        Raises:
            WorkerError: one cannot be started.
        """

        async def start(worker: _Worker) -> None:
            process = await worker.start()
            self._tasks.append(asyncio.create_task(worker.keep(process)))

        started = await asyncio.gather(*map(start, self._workers), return_exceptions=True)
        for error in started:
            if error is not None:
                raise error

    async def stop(self) -> None:
        """Kill all workers, and answer 503 to the requests that are left."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.refuse()

    def describe(self) -> dict[str, Any]:
        """The workers' processes and the number of requests that wait, as for ``ade status``."""
        return {
            "workers": [worker.describe() for worker in self._workers],
            "queued": len(self.waiting),
            "queue_room": None,  # the front bounds it
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
            self._fail(request, error)
            raise
        finally:
            timer.cancel()
            if not request.is_probe:
                self._count(ANSWER_SECONDS, time.perf_counter() - request.arrived)

    def _fail(self, request: Request, error: ApiError) -> None:
        """Count a request that the workers failed."""
        if not self._is_stopping and not request.is_probe:
            self._count(FAILURES, 1.0, code=error.code)

    def begin(self, batch: list[Job]) -> None:
        """Mark a batch as being computed."""
        now = time.perf_counter()  # uvloop's own clock counts milliseconds
        waited = [now - job.request.arrived for job in batch if not job.request.is_probe]
        if waited:
            self._count(QUEUE_SECONDS, sum(waited))

    def _count(self, metric: Metric, value: float, **labels: str) -> None:
        common = {"model_name": self.name, **labels, MODEL: self.identity}
        self.metrics.update(metric.name, common, value)


@contextlib.contextmanager
def _answering(seconds: float) -> Iterator[None]:
    """Turn what a connection raises when it ends or is silent into a :class:`WorkerError`."""
    try:
        yield
    except TimeoutError:
        raise WorkerError(f"it did not answer within {seconds:g} s") from None
    except (EOFError, OSError, RuntimeError, ValueError) as error:
        raise WorkerError(f"its connection ended: {error}") from None


class _Process:
    """A running worker."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self.process = process
        self.gone = asyncio.create_task(process.wait())
        self._reader = reader
        self._writer = writer

    async def ask(self, parts: list[wire.Body], seconds: float) -> wire.Message:
        """Send a message and wait for the next.

        Raises:
            WorkerError: no valid message comes in time.
        """
        with _answering(seconds):
            self._writer.writelines(parts)
        return await self.next(seconds)

    async def next(self, seconds: float) -> wire.Message:
        """Wait for the next message.

        Raises:
            WorkerError: no valid message comes in time.
        """
        with _answering(seconds):
            async with asyncio.timeout(seconds):
                await self._writer.drain()
                return await wire.receive(self._reader)

    async def end(self) -> int:
        """Kill it unless it has ended; returns its exit code."""
        self._writer.close()
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        return await self.gone


class _Worker:
    """One place in a pool, whose process is replaced when it ends."""

    def __init__(self, pool: Pool, settings: WorkerSettings) -> None:
        self._pool = pool
        self._settings = settings
        self._pid: int | None = None
        self.is_ready = False

    def describe(self) -> dict[str, Any]:
        """The process, and whether it can compute."""
        return {"pid": self._pid, "state": "READY" if self.is_ready else "STARTING"}

    async def start(self) -> _Process:
        """Start a process and wait until it is ready.

        Raises:
            WorkerError: it does not become ready.
        """
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                made = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-m",
                    WORKER,
                    stdin=theirs.fileno(),
                    env=child_environment(**VARIABLES),
                )
            self._pid = made.pid
            reader, writer = await asyncio.open_unix_connection(sock=ours, limit=BUFFER_BYTES)
        except BaseException:
            ours.close()  # a worker ends with its connection
            raise
        process = _Process(made, reader, writer)
        try:
            first = wire.pack({"settings": dataclasses.asdict(self._settings)})
            head, _ = await process.ask(first, STARTUP_TIMEOUT_S)
            if "error" in head:
                raise WorkerError(head["error"])
            # The new process does not know all that the one before reported.
            self._pool.metrics.drop_gauges(self._labels({}))
            self._measure(head)
        except BaseException as error:
            code = await process.end()
            if isinstance(error, WorkerError):
                raise WorkerError(
                    f"worker {self._settings.name} did not start: {error} (exit code {code})"
                ) from None
            raise
        self.is_ready = True
        return process

    async def keep(self, process: _Process) -> None:
        """Give batches to the process, and start another one whenever it ends."""
        pause = PAUSE_S
        try:
            while True:
                try:
                    while True:
                        await self._compute(process, await self._next_batch(process))
                        pause = PAUSE_S
                except WorkerError as error:
                    self.is_ready = False
                    code = await process.end()
                    logger.error(
                        "worker %s ended: %s (exit code %d)", self._settings.name, error, code
                    )
                while not self.is_ready:
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, MAX_PAUSE_S)
                    try:
                        process = await self.start()
                    except Exception as error:  # whatever it is, the next one may start
                        logger.error("%s", str(error) or repr(error))
                        self._update(STARTS.name, {}, 1.0)  # which no worker reports
        finally:
            await process.end()
            # A worker of another release that has the same labels reports its own again.
            self._pool.metrics.drop_gauges(self._labels({}))

    async def _next_batch(self, process: _Process) -> list[Job]:
        """The next batch for the process; empty if no request came for a while.

        Raises:
            WorkerError: the process ended meanwhile; no waiting request is lost.
        """
        waiting = asyncio.create_task(self._pool.waiting.next_batch())
        try:
            await asyncio.wait(
                (waiting, process.gone), timeout=IDLE_S, return_when=asyncio.FIRST_COMPLETED
            )
            if process.gone.done():
                raise WorkerError("its process ended")
        except BaseException:
            if waiting.done():
                self._pool.waiting.put(*waiting.result())
            waiting.cancel()
            raise
        if waiting.done():
            return waiting.result()
        waiting.cancel()
        return []

    async def _compute(self, process: _Process, batch: list[Job]) -> None:
        self._pool.begin(batch)
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
            head, bodies = await process.ask(
                wire.pack({"requests": about}, [job.request.body for job in batch]),
                RESPONSE_TIMEOUT_S,
            )
            for job, given, body in zip(batch, head["answers"], bodies, strict=True):
                headers = [("content-type", given["content_type"]), *given["headers"].items()]
                if not job.answer.done():
                    job.answer.set_result(
                        Answer(given["status"], [*headers, ("x-request-id", job.id)], body)
                    )
            rest, _ = await process.next(RESPONSE_TIMEOUT_S)
            self._measure(rest)
            is_leaving = rest["leaving"]
        except Exception as error:  # an invalid message can raise anything, a large one MemoryError
            for job in batch:
                job.fail(worker_died())
            raise WorkerError(str(error) or repr(error)) from None
        except asyncio.CancelledError:  # the pool is stopped
            for job in batch:
                job.fail(stopping())
            raise
        if is_leaving:
            raise WorkerError("a request did not fit into memory")

    def _measure(self, head: dict[str, Any]) -> None:
        """Add the measurements of a message.

        Raises:
            WorkerError: they are invalid.
        """
        try:
            for name, labels, value in head["measurements"]:
                self._update(name, labels, float(value))
        except (KeyError, TypeError, ValueError) as error:
            raise WorkerError(f"its measurements are invalid: {error!r}") from None

    def _update(self, name: str, labels: dict[str, str], value: float) -> None:
        self._pool.metrics.update(name, self._labels(labels), value)

    def _labels(self, labels: dict[str, str]) -> dict[str, str]:
        """Labels of a measurement, with those that all of this worker have."""
        common = {
            "model_name": self._pool.name,
            "worker": self._settings.name.rpartition("-")[2],
        }
        return {**common, **labels, MODEL: self._settings.identity}
