"""Runs worker processes on socket pairs, gives them batches, and replaces those that end.

Native code that crashes ends only its own process.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from handlers.limits import RESPONSE_TIMEOUT_S, STARTUP_TIMEOUT_S
from handlers.processes.environment import child_environment
from handlers.service import pool, wire
from handlers.service.pool import MAX_PAUSE_S, PAUSE_S, VARIABLES, PooledModel, WorkerError
from handlers.service.worker import WorkerSettings

logger = logging.getLogger(__name__)
# After which an idle worker gets an empty batch, and reports what lasts again.
IDLE_S = 5.0
BUFFER_BYTES = 2**20
WORKER = "handlers.service.worker"


class Pool(pool.Pool):
    """Worker processes, each with one model."""

    def __init__(self, models: Sequence[PooledModel], folder: Path) -> None:
        super().__init__(models, folder)
        self._workers = [_Worker(model, one) for model in models for one in model.settings]
        for worker in self._workers:
            worker.model.workers.append(worker)
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """See :class:`handlers.service.pool.Pool`."""

        async def start(worker: _Worker) -> None:
            process = await worker.start()
            self._tasks.append(asyncio.create_task(worker.keep(process)))

        started = await asyncio.gather(*map(start, self._workers), return_exceptions=True)
        for error in started:
            if error is not None:
                raise error

    async def stop(self) -> None:
        """See :class:`handlers.service.pool.Pool`."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


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
    """One place of a model, whose process is replaced when it ends."""

    def __init__(self, model: PooledModel, settings: WorkerSettings) -> None:
        self.model = model
        self._settings = settings
        self._name = settings.name.rpartition("-")[2]
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
            self.model.drop_gauges(self._name)
            self.model.measure(self._name, head)
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
                        await self._compute(process)
                        pause = PAUSE_S
                except Exception as error:  # the front may have no memory for an answer
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
                        self.model.count_failed_start(self._name)
        finally:
            await process.end()
            self.model.drop_gauges(self._name)

    async def _compute(self, process: _Process) -> None:
        """Have the next batch computed.

        Raises:
            WorkerError: the process has to be replaced.
        """
        batch = await self.model.next_batch(process.gone, IDLE_S)
        await self.model.compute(batch, lambda parts: process.ask(parts, RESPONSE_TIMEOUT_S))
        rest, _ = await process.next(RESPONSE_TIMEOUT_S)
        self.model.measure(self._name, rest)
        if rest["leaving"]:
            raise WorkerError("a request did not fit into memory")
