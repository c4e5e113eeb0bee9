"""Brings a front's requests to the replicas of one model, several in a call.

A call between Ray's actors takes some milliseconds of both processors, however little it carries.
"""

from __future__ import annotations

import asyncio
import contextvars
from typing import Any, NamedTuple

from handlers.limits import MAX_BATCH

# Seconds that a request waits for others to join its call, if another call is in progress. A client
# that is alone never waits. Under load, the answers of one call come together, and so do their
# clients' next requests.
WAIT_S = 0.003
MAX_BYTES = 2**20  # of the bodies in a call, unless a single one is larger


# Status, headers and body, as they travel to the front.
Answered = tuple[int, list[tuple[str, str]], bytes]


class Asked(NamedTuple):
    """A request as it travels to a replica: what a worker is told of it, and its body."""

    about: dict[str, Any]
    body: bytes


class NotComputed(RuntimeError):
    """The replica could not compute the batch."""


class Job(NamedTuple):
    """A request that waits, and the future of its answer."""

    asked: Asked
    answer: asyncio.Future[Answered]


class Calls:
    """The calls of one front to one model.

    Args:
        handle: of the deployment of :class:`extensions.ray.serve.replica.Replica`.
    """

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        # In the context of a request, Ray would cancel the whole call when its client leaves.
        self._context = contextvars.copy_context()
        self._waiting: list[Job] = []
        self._bytes = 0
        self._under_way: set[asyncio.Task[None]] = set()

    async def answer(self, asked: Asked) -> Answered:
        """The answer to one request.

        Cancelling one request cancels the call only if no other request in it is still waiting.

        Raises:
            NotComputed: its batch failed.
            Exception: Ray's, of the call.
        """
        loop = asyncio.get_running_loop()
        job = Job(asked, loop.create_future())
        if self._waiting and self._bytes + len(asked.body) > MAX_BYTES:
            self._call()
        self._waiting.append(job)
        self._bytes += len(asked.body)
        if len(self._waiting) == MAX_BATCH or not self._under_way:
            self._call()
        elif len(self._waiting) == 1:
            loop.call_later(WAIT_S, self._call_with, job)
        return await job.answer

    def _call_with(self, job: Job) -> None:
        """Send what waits if a certain request is among it."""
        if self._waiting and self._waiting[0] is job:
            self._call()

    def _call(self) -> None:
        jobs = [job for job in self._waiting if not job.answer.done()]
        self._waiting, self._bytes = [], 0
        if not jobs:
            return
        task = asyncio.create_task(self._carry(jobs), context=self._context.copy())
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        left = len(jobs)

        def leave(_: asyncio.Future[Answered]) -> None:
            nonlocal left
            left -= 1
            if not left:  # all clients are gone, unless the task has ended
                task.cancel()

        for job in jobs:
            job.answer.add_done_callback(leave)

    async def _carry(self, jobs: list[Job]) -> None:
        response = self._handle.remote([job.asked for job in jobs])
        try:
            answers = await response
        except asyncio.CancelledError:  # all clients are gone, or Ray ended it
            response.cancel()  # otherwise the replica would compute it
            for job in jobs:
                _settle(job, NotComputed("its call was cancelled"))
            raise
        except Exception as error:
            for job in jobs:
                _settle(job, error)
            return
        for job, answered in zip(jobs, answers, strict=True):
            _settle(job, NotComputed("its batch failed") if answered is None else answered)


def _settle(job: Job, result: Answered | Exception) -> None:
    if job.answer.done():  # the client is gone
        return
    if isinstance(result, Exception):
        job.answer.set_exception(result)
    else:
        job.answer.set_result(result)
