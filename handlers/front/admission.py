"""Decides which requests get the front's memory and the workers' time."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from handlers.limits import MAX_BATCH, MAX_REQUEST_BYTES, QUEUE_SIZE, RESPONSE_TIMEOUT_S
from serving.api.guard import Receive, Scope, header_values
from serving.api.protocol import ConnectionLimits
from serving.ingest.errors import ApiError, overloaded

T = TypeVar("T")
# Seconds after an answer to a client in which probes need not wait behind other requests.
ANSWERING_S = 60.0


@dataclass(frozen=True)
class Limits(ConnectionLimits):
    """Limits of the front; tests make them small.

    Attributes:
        body_bytes: size of a body.
        memory_bytes: size of all held bodies and answers together.
        free_bytes: bytes of each body or answer that do not count, so that small requests are
            accepted while large ones fill the memory.
        in_flight: lower bound, start and upper bound of the requests per model that the engine has
            at a time; each is raised to the number of the model's workers.
        latency_s: target for the time that a request spends in the engine, queue included.
        waiting: requests per model that wait here for their turn.
        waiting_s: seconds that they wait.
        upstream_s: seconds for the engine to answer.
    """

    body_bytes: int = MAX_REQUEST_BYTES
    memory_bytes: int = 256 * 2**20
    free_bytes: int = 64 * 2**10
    in_flight: tuple[int, int, int] = (MAX_BATCH // 2, 2 * MAX_BATCH, QUEUE_SIZE)
    latency_s: float = 5.0
    waiting: int = QUEUE_SIZE
    waiting_s: float = 120.0
    upstream_s: float = RESPONSE_TIMEOUT_S + 5.0


class ClientGone(Exception):
    """The client closed the connection."""


class Memory:
    """Counts the bytes of all held bodies and answers."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._used = 0

    @contextlib.contextmanager
    def reserve(self) -> Iterator[Reservation]:
        """The reservation of one request, for the block."""
        reservation = Reservation(self)
        try:
            yield reservation
        finally:
            reservation.hold(0)

    def fits(self, old: int, new: int) -> bool:
        """Count a new size instead of an old one; returns whether there is room for it."""
        free = self._limits.free_bytes
        self._used += max(0, new - free) - max(0, old - free)
        return new <= free or self._used <= self._limits.memory_bytes


class Reservation:
    """The memory of one request: its body, later its answer."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._size = 0

    def hold(self, size: int) -> bool:
        """Set the size in bytes; returns whether there is room. It counts in either case."""
        old, self._size = self._size, size
        return self._memory.fits(old, size)


async def read_body(
    scope: Scope, receive: Receive, reservation: Reservation, limits: Limits
) -> bytearray:
    """Read the whole body of a request.

    Raises:
        ApiError: 413 if it is too large, 503 if all bodies together are too large.
        ClientGone: the client closed the connection.
    """
    # Python reads no more than 4,300 digits; parsers of HTTP read any number of zeros, and some
    # keep the spaces behind a value.
    values = header_values(scope, "content-length")
    lengths = [value.strip(" \t").lstrip("0") or "0" for value in values]
    if any(int(length) > limits.body_bytes for length in lengths):
        raise _too_large(limits)
    body = bytearray()
    try:
        is_complete = False
        while not is_complete:
            message = await receive()
            if message["type"] != "http.request":
                raise ClientGone
            body += message["body"]
            if len(body) > limits.body_bytes:
                raise _too_large(limits)
            if not reservation.hold(len(body)):
                raise overloaded("the bodies of all requests are too large together")
            is_complete = not message.get("more_body", False)
    except BaseException:
        body.clear()  # the error's traceback would keep it in memory
        reservation.hold(0)
        raise
    return body


def _too_large(limits: Limits) -> ApiError:
    return ApiError(
        413, "request_too_large", f"a request may have at most {limits.body_bytes} bytes"
    )


class Count:
    """The number of blocks that it is entered for."""

    def __init__(self) -> None:
        self.number = 0

    def __enter__(self) -> None:
        self.number += 1

    def __exit__(self, *_: object) -> None:
        self.number -= 1


class InFlightLimit:
    """Bounds the number of one model's requests in the engine; the others wait here.

    A worker computes every request of its batch, even if the client is gone. So the engine should
    have just enough requests to keep the workers busy with full batches. The cost of a request
    varies by a factor of a thousand, therefore the bound adapts to the time that answers take.
    After a slow answer it is set, by Little's law, to the number that gives ``latency_s`` at the
    present throughput. With each faster answer it grows by one while requests wait. It is never
    less than the number of workers, or some would have nothing to do.

    Args:
        limits: of the front.
        workers: that compute the model's answers, at most.

    Attributes:
        clients: entered while a client, which is no probe, has a request.
    """

    def __init__(self, limits: Limits, workers: int = 1) -> None:
        self.clients = Count()
        self._limits = limits
        self._least, self._bound, self._most = (max(n, workers) for n in limits.in_flight)
        self._num_in_flight = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._answered = -math.inf  # when the last of them had its answer

    @property
    def num_waiting(self) -> int:
        """Number of requests that wait for their turn."""
        return len(self._waiting)

    def has_answered(self) -> None:
        """Note that a client has just got an answer."""
        self._answered = time.monotonic()

    def is_answering(self) -> bool:
        """Whether clients have requests in progress, and one had its answer lately."""
        return self.clients.number > 0 and time.monotonic() - self._answered < ANSWERING_S

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait for a turn and hold it for the block.

        Raises:
            ApiError: 503 if too many requests wait, or this one waited too long.
        """
        if not self._waiting and self._num_in_flight < self._bound:
            self._num_in_flight += 1
        else:
            await self._wait()
        num_sent, clock = self._num_in_flight, asyncio.get_running_loop().time
        started = clock()
        try:
            yield
            self._adapt(num_sent, clock() - started)
        finally:
            self._leave()

    async def _wait(self) -> None:
        if len(self._waiting) >= self._limits.waiting:
            raise overloaded("too many requests are waiting")
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            async with asyncio.timeout(self._limits.waiting_s):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():  # it got its turn just as it gave up
                self._leave()
            with contextlib.suppress(ValueError):  # removed already
                self._waiting.remove(turn)
            if isinstance(error, TimeoutError):
                raise overloaded("the request has waited too long") from None
            raise

    def _adapt(self, num_sent: int, seconds: float) -> None:
        """Adapt the bound to an answer.

        Args:
            num_sent: requests in flight when the turn of the answered one came.
            seconds: that the answer took.
        """
        if seconds > self._limits.latency_s:
            fitting = int(num_sent * self._limits.latency_s / seconds)
            self._bound = max(self._least, min(self._bound, fitting))
        elif self._waiting:
            self._bound = min(self._bound + 1, self._most)

    def _leave(self) -> None:
        """End a turn."""
        self._num_in_flight -= 1
        while self._waiting and self._num_in_flight < self._bound:
            turn = self._waiting.popleft()
            if not turn.done():
                self._num_in_flight += 1
                turn.set_result(None)


async def unless_gone(work: Awaitable[T], receive: Receive) -> T:
    """Wait for something, and cancel it if the client closes the connection.

    Raises:
        ClientGone: it did.
    """
    worker, watcher = asyncio.ensure_future(work), asyncio.create_task(hang_up(receive))
    try:
        await asyncio.wait((worker, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not worker.done():
            raise ClientGone
        return worker.result()
    finally:
        worker.cancel()
        watcher.cancel()


async def hang_up(receive: Receive) -> None:
    """Wait until the client closes the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
