"""A queue of requests, from which workers take batches."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any, Generic, Protocol, TypeVar

from handlers.limits import LARGE_BYTES, MAX_BATCH, MAX_BATCH_DELAY_S


class Waiting(Protocol):
    """A request that waits for its answer."""

    @property
    def answer(self) -> asyncio.Future[Any]:
        """Done early if nobody waits for it any more."""

    @property
    def num_bytes(self) -> int:
        """The size of its body."""


Job = TypeVar("Job", bound=Waiting)


class BatchQueue(Generic[Job]):
    """Requests that wait, taken in batches by whoever is free.

    A batch is collected when it can be computed, not before: so as many requests as possible share
    one. It waits up to ``MAX_BATCH_DELAY_S`` for more requests, but only if others are queued or
    the last batch had several. It ends with the request whose body makes it large, since a worker
    with many large requests would keep them all waiting while other workers are free. Of several
    free workers, the one that became free last collects it, because its weights are still in the
    processor's caches.
    """

    def __init__(self) -> None:
        self._queue: dict[asyncio.Future[Any], Job] = {}  # by the answer
        self._arrived = asyncio.Event()
        self._free: list[asyncio.Future[None]] = []  # those of free workers, the latest last
        self._is_collecting = False
        self._last_was_shared = False  # whether the last batch had several requests

    def __len__(self) -> int:
        return len(self._queue)

    def put(self, *jobs: Job) -> None:
        """Append requests. Each is removed, with its body, as soon as nobody waits for it."""
        for job in jobs:
            self._queue[job.answer] = job
            job.answer.add_done_callback(self._leave)
        self._arrived.set()
        self._call()

    def clear(self) -> list[Job]:
        """Remove all requests, and return them."""
        jobs = list(self._queue.values())
        self._queue.clear()
        return jobs

    async def next_batch(self) -> list[Job]:
        """Wait for the next batch; one caller collects at a time. Cancelling loses no request."""
        batch: list[Job] = []
        try:
            async with self._turn():
                batch.append(await self._next())
                num_bytes = batch[0].num_bytes
                if self._last_was_shared or len(self):
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(MAX_BATCH_DELAY_S):
                            while len(batch) < MAX_BATCH and num_bytes < LARGE_BYTES:
                                batch.append(await self._next())
                                num_bytes += batch[-1].num_bytes
                self._last_was_shared = len(batch) > 1
        except BaseException:
            self.put(*batch)
            raise
        return batch

    @contextlib.asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """Be the one who collects for the length of the block, once a request waits."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._free.append(turn)
        self._call()
        try:
            await turn
            yield
        finally:
            if turn.cancelled():
                with contextlib.suppress(ValueError):  # it was called just then
                    self._free.remove(turn)
            else:
                self._is_collecting = False
                self._call()

    def _call(self) -> None:
        """Let the worker that became free last collect, if there is something to collect."""
        while self._free and len(self) and not self._is_collecting:
            turn = self._free.pop()
            if not turn.done():  # otherwise it was cancelled
                self._is_collecting = True
                turn.set_result(None)

    async def _next(self) -> Job:
        while True:
            while not self._queue:
                self._arrived.clear()
                await self._arrived.wait()
            job = self._queue.pop(next(iter(self._queue)))
            if not job.answer.done():  # otherwise the client has just left
                return job

    def _leave(self, answer: asyncio.Future[Any]) -> None:
        self._queue.pop(answer, None)
