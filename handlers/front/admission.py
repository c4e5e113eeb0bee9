"""Who may take the front's memory and the model server's time, and how long others wait for them."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any

from handlers.limits import MAX_BATCH, MAX_REQUEST_BYTES, QUEUE_SIZE, RESPONSE_TIMEOUT_S
from serving.api.errors import ApiError
from serving.api.guard import Receive, Scope, header_values


@dataclass(frozen=True)
class Limits:
    """Limits of the front; tests make them small.

    Attributes:
        connections: at most, of all clients.
        head_s: for a request's head to come.
        head_bytes: of a head.
        write_s: for a client to read a part of an answer, of 256 KiB.
        body_bytes: of a body.
        body_idle_s: between two parts of a body.
        body_grace_s: how far a body may fall behind ``body_rate``.
        body_rate: bytes per second.
        memory_bytes: of all bodies and answers that are held.
        free_bytes: of each, which do not count: small requests come in while large ones fill the
            memory.
        in_flight: lower bound, start and upper bound of a model's requests that are with the model
            server.
        latency_s: how long one of them should take at most there, its queue included.
        waiting: requests of a model that wait here for their turn.
        waiting_s: how long.
        upstream_s: for the model server's answer.
    """

    connections: int = 2048
    head_s: float = 10.0
    head_bytes: int = 64 * 2**10
    write_s: float = 10.0
    body_bytes: int = MAX_REQUEST_BYTES
    body_idle_s: float = 15.0
    body_grace_s: float = 60.0
    body_rate: float = 64 * 2**10
    memory_bytes: int = 256 * 2**20
    free_bytes: int = 64 * 2**10
    in_flight: tuple[int, int, int] = (MAX_BATCH // 2, 2 * MAX_BATCH, QUEUE_SIZE)
    latency_s: float = 5.0
    waiting: int = QUEUE_SIZE
    waiting_s: float = 120.0
    upstream_s: float = RESPONSE_TIMEOUT_S + 5.0


class ClientGone(Exception):
    """The client hung up: nobody waits for an answer."""


def overloaded(message: str) -> ApiError:
    """503, as for a full queue."""
    return ApiError(503, "overloaded", f"{message}: try again later")


class Memory:
    """Counts the bytes that all bodies and answers take together, and decides who gives way if they
    are too many.

    A body that is still arriving and an answer that is still being read give way to smaller ones,
    the largest first: otherwise a few clients that are slow on purpose would keep all others out.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._used = 0
        self._shares: set[Share] = set()

    @contextlib.contextmanager
    def share(self) -> Iterator[Share]:
        """One request's part, given back at the end."""
        share = Share(self)
        self._shares.add(share)
        try:
            yield share
        finally:
            share.hold(0)
            self._shares.discard(share)

    def fits(self, share: Share, size: int) -> bool:
        """Count a part that grew or shrank, and make room for it; whether there is some."""
        free = self._limits.free_bytes
        self._used += max(0, size - free) - max(0, share.size - free)
        share.size = size
        while size > free and self._used > self._limits.memory_bytes:
            largest = max(
                (s for s in self._shares if s.patience is not None),
                key=lambda s: s.size,
                default=share,
            )
            if largest.size <= size:
                return False
            largest.drop()
        return True


class Share:
    """What one request holds: its body, then its answer.

    Attributes:
        size: bytes.
        patience: ends the wait for the client, while there is one.
        was_dropped: whether it ended because others needed the memory.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self.size = 0
        self.patience: asyncio.Timeout | None = None
        self.was_dropped = False

    def hold(self, size: int) -> bool:
        """Hold so many bytes; whether there is room. They count in either case."""
        return self._memory.fits(self, size)

    @contextlib.asynccontextmanager
    async def waiting(self, seconds: float | None) -> AsyncIterator[None]:
        """Wait for the client, at most so long.

        Raises:
            TimeoutError: it took longer, or others needed the memory.
        """
        try:
            async with asyncio.timeout(seconds) as self.patience:
                yield
        finally:
            self.patience = None

    def drop(self) -> None:
        """Give the memory to others."""
        self.hold(0)
        self.was_dropped = True
        if self.patience is not None and not self.patience.expired():
            self.patience.reschedule(asyncio.get_running_loop().time())


async def read_body(scope: Scope, receive: Receive, share: Share, limits: Limits) -> bytearray:
    """The whole body of a request.

    Raises:
        ApiError: 413, 408 if it stalls, 503 if all bodies together are too large.
        ClientGone: the client hung up.
    """
    if any(int(value) > limits.body_bytes for value in header_values(scope, "content-length")):
        raise _too_large(limits)
    body = bytearray()
    try:
        await _fill(body, receive, share, limits)
    except BaseException:
        body.clear()  # the error's traceback holds it, and what is left of the body may still be passed over
        share.hold(0)
        raise
    return body


async def _fill(body: bytearray, receive: Receive, share: Share, limits: Limits) -> None:
    clock = asyncio.get_running_loop().time
    deadline, is_complete = clock() + limits.body_grace_s, False
    while not is_complete:
        try:
            async with share.waiting(min(limits.body_idle_s, deadline - clock())):
                message = await receive()
        except TimeoutError:
            if share.was_dropped:
                raise overloaded("the bodies of all requests are too large together") from None
            raise ApiError(
                408, "request_timeout", f"the body came too slowly: {len(body)} bytes so far"
            ) from None
        if message["type"] != "http.request":
            raise ClientGone
        body += message["body"]
        if len(body) > limits.body_bytes:
            raise _too_large(limits)
        if not share.hold(len(body)):
            raise overloaded("the bodies of all requests are too large together")
        # Fast parts do not earn the right to stall for long.
        deadline = min(
            deadline + len(message["body"]) / limits.body_rate, clock() + limits.body_grace_s
        )
        is_complete = not message.get("more_body", False)


def _too_large(limits: Limits) -> ApiError:
    return ApiError(413, "request_too_large", f"a request may have {limits.body_bytes} bytes")


class Lane:
    """Lets a bounded number of one model's requests go to the model server; the others wait here
    for their turn.

    What the model server has taken it computes, even if its client has gone; it holds its turn
    until then. What waits here can still be dropped. So no more should be there than keeps the
    workers busy with full batches. Their number and what a request costs differ by a thousand,
    therefore the bound follows the time that answers take: by Little's law it is what gives
    ``latency_s`` at the present throughput, and it grows by one with each faster answer while
    requests wait.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._least, self._bound, self._most = limits.in_flight
        self._num_in_flight = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @contextlib.asynccontextmanager
    async def turn(self, receive: Receive) -> AsyncIterator[None]:
        """Wait for the turn, and hold it.

        Args:
            receive: of the request, whose body has been read.

        Raises:
            ApiError: 503, too many wait or it took too long.
            ClientGone: the client hung up before.
        """
        if self._waiting or self._num_in_flight >= self._bound:
            await _unless_gone(self._wait(), receive)
        else:
            self._num_in_flight += 1
        num_sent, started = self._num_in_flight, asyncio.get_running_loop().time()
        try:
            yield
            self._adapt(num_sent, asyncio.get_running_loop().time() - started)
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
            if (
                turn.done() and not turn.cancelled()
            ):  # it was let go in the moment in which it gave up
                self._leave()
            with contextlib.suppress(ValueError):  # taken out already
                self._waiting.remove(turn)
            if isinstance(error, TimeoutError):
                raise overloaded("the request has waited too long") from None
            raise

    def _adapt(self, num_sent: int, seconds: float) -> None:
        if seconds > self._limits.latency_s:
            fitting = int(num_sent * self._limits.latency_s / seconds)
            self._bound = max(self._least, min(self._bound, fitting))
        elif self._waiting:
            self._bound = min(self._bound + 1, self._most)

    def _leave(self) -> None:
        self._num_in_flight -= 1
        while self._waiting and self._num_in_flight < self._bound:
            turn = self._waiting.popleft()
            if not turn.done():
                self._num_in_flight += 1
                turn.set_result(None)


async def _unless_gone(wait: Coroutine[Any, Any, None], receive: Receive) -> None:
    """Wait for something, but not if the client hangs up."""
    waiter, watcher = asyncio.create_task(wait), asyncio.create_task(hang_up(receive))
    try:
        await asyncio.wait((waiter, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not waiter.done():
            raise ClientGone
        waiter.result()
    finally:
        waiter.cancel()
        watcher.cancel()


async def hang_up(receive: Receive) -> None:
    """Wait until the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
