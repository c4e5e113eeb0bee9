"""Decides which requests get the front's memory and the workers' time."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from handlers.limits import MAX_BATCH, MAX_REQUEST_BYTES, QUEUE_SIZE, RESPONSE_TIMEOUT_S
from serving.api.guard import Receive, Scope, header_values
from serving.ingest.errors import ApiError, overloaded

T = TypeVar("T")
# Seconds after an answer to a client in which probes need not wait behind other requests.
ANSWERING_S = 60.0


@dataclass(frozen=True)
class Limits:
    """Limits of the front; tests make them small.

    Attributes:
        connections: number of connections to a port, over all clients.
        head_s: seconds for the head of a request to arrive.
        head_bytes: size of a head.
        write_s: seconds for a client to read a slice of an answer (256 KiB).
        body_bytes: size of a body.
        body_idle_s: seconds between two parts of a body.
        body_grace_s: seconds that a body may fall behind ``body_rate``.
        body_rate: minimum bytes per second of a body.
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
    """The client closed the connection."""


class Memory:
    """Counts the bytes of all held bodies and answers, and drops some above the limit.

    Bodies that are still arriving and answers that are still being read are dropped in favour of
    smaller ones, the largest first. Otherwise a few deliberately slow clients could block all
    others.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._used = 0
        self._reservations: set[Reservation] = set()

    def reserve(self) -> Reservation:
        """The reservation of one request, to be entered."""
        return Reservation(self)

    def add(self, reservation: Reservation) -> None:
        """Count a reservation from now on."""
        self._reservations.add(reservation)

    def remove(self, reservation: Reservation) -> None:
        """Release what a reservation holds."""
        self.fits(reservation, 0)
        self._reservations.discard(reservation)

    def fits(self, reservation: Reservation, size: int) -> bool:
        """Count a new size and make room for it; returns whether there is room."""
        free = self._limits.free_bytes
        self._used += max(0, size - free) - max(0, reservation.size - free)
        reservation.size = size
        while size > free and self._used > self._limits.memory_bytes:
            largest = max(
                (s for s in self._reservations if s.patience is not None),
                key=lambda s: s.size,
                default=reservation,
            )
            if largest.size <= size:
                return False
            largest.drop()
        return True


class Reservation:
    """The memory of one request: its body, later its answer. Released at the end of the block.

    Attributes:
        size: in bytes.
        patience: the timeout of the present wait for the client, if any.
        was_dropped: whether the memory was given to other requests.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self.size = 0
        self.patience: asyncio.Timeout | None = None
        self.was_dropped = False

    def __enter__(self) -> Reservation:
        self._memory.add(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._memory.remove(self)

    def hold(self, size: int) -> bool:
        """Set the size; returns whether there is room. The size counts in either case."""
        return self._memory.fits(self, size)

    @contextlib.asynccontextmanager
    async def waiting(self, seconds: float | None) -> AsyncIterator[None]:
        """Wait for the client for at most ``seconds``.

        Raises:
            TimeoutError: it took longer, or the reservation was dropped.
        """
        try:
            async with asyncio.timeout(seconds) as self.patience:
                yield
        finally:
            self.patience = None

    def drop(self) -> None:
        """Release the memory and end the wait for the client."""
        self.hold(0)
        self.was_dropped = True
        if self.patience is not None and not self.patience.expired():
            self.patience.reschedule(asyncio.get_running_loop().time())


async def read_body(
    scope: Scope, receive: Receive, reservation: Reservation, limits: Limits
) -> bytearray:
    """Read the whole body of a request.

    Raises:
        ApiError: 413 if it is too large, 408 if it stalls, 503 if all bodies together are too
            large.
        ClientGone: the client closed the connection.
    """
    # Python reads no more than 4,300 digits; parsers of HTTP read any number of zeros, and some
    # keep the spaces behind a value.
    values = header_values(scope, "content-length")
    lengths = [value.strip(" \t").lstrip("0") or "0" for value in values]
    if any(int(length) > limits.body_bytes for length in lengths):
        raise _too_large(limits)
    body = bytearray()
    has_message = (scope.get("extensions") or {}).get("ade.has_message", lambda: False)
    try:
        await _fill(body, receive, reservation, limits, has_message)
    except BaseException:
        body.clear()  # the error's traceback would keep it in memory
        reservation.hold(0)
        raise
    return body


async def _fill(
    body: bytearray,
    receive: Receive,
    reservation: Reservation,
    limits: Limits,
    has_message: Callable[[], bool],
) -> None:
    clock = asyncio.get_running_loop().time
    deadline, is_complete = clock() + limits.body_grace_s, False
    while not is_complete:
        try:
            if has_message():  # a small body mostly comes with its head
                message = await receive()
            else:
                async with reservation.waiting(min(limits.body_idle_s, deadline - clock())):
                    message = await receive()
        except TimeoutError:
            if reservation.was_dropped:
                raise overloaded("the bodies of all requests are too large together") from None
            raise ApiError(
                408, "request_timeout", f"the body came too slowly: {len(body)} bytes so far"
            ) from None
        if message["type"] != "http.request":
            raise ClientGone
        body += message["body"]
        if len(body) > limits.body_bytes:
            raise _too_large(limits)
        if not reservation.hold(len(body)):
            raise overloaded("the bodies of all requests are too large together")
        # A fast start does not extend the grace period.
        deadline = min(
            deadline + len(message["body"]) / limits.body_rate, clock() + limits.body_grace_s
        )
        is_complete = not message.get("more_body", False)


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

    def turn(self, receive: Receive) -> Turn:
        """Wait for a turn and hold it for the block.

        Args:
            receive: of the request, whose body has been read.

        Raises:
            ApiError: 503 if too many requests wait, or this one waited too long.
            ClientGone: the client closed the connection meanwhile.
        """
        return Turn(self, receive)

    async def enter(self, receive: Receive) -> int:
        """Wait for a turn; returns the number of requests in flight, this one included."""
        if self._has_room():
            self._num_in_flight += 1
        else:
            turn = asyncio.ensure_future(self._wait())
            try:
                await unless_gone(turn, receive)
            except BaseException:
                # Cancelled just as the turn came; a turn that comes later is given back by _wait.
                if turn.done() and not turn.cancelled() and turn.exception() is None:
                    self.leave()
                raise
        return self._num_in_flight

    def _has_room(self) -> bool:
        return not self._waiting and self._num_in_flight < self._bound

    async def _wait(self) -> None:
        if self._has_room():  # the last request in flight left before this task began
            self._num_in_flight += 1
            return
        if len(self._waiting) >= self._limits.waiting:
            raise overloaded("too many requests are waiting")
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            async with asyncio.timeout(self._limits.waiting_s):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():  # it got its turn just as it gave up
                self.leave()
            with contextlib.suppress(ValueError):  # removed already
                self._waiting.remove(turn)
            if isinstance(error, TimeoutError):
                raise overloaded("the request has waited too long") from None
            raise

    def adapt(self, num_sent: int, seconds: float) -> None:
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

    def leave(self) -> None:
        """End a turn."""
        self._num_in_flight -= 1
        while self._waiting and self._num_in_flight < self._bound:
            turn = self._waiting.popleft()
            if not turn.done():
                self._num_in_flight += 1
                turn.set_result(None)


class Turn:
    """A request's turn, see :meth:`InFlightLimit.turn`."""

    def __init__(self, in_flight: InFlightLimit, receive: Receive) -> None:
        self._in_flight = in_flight
        self._receive = receive

    async def __aenter__(self) -> None:
        self._num_sent = await self._in_flight.enter(self._receive)
        self._started = asyncio.get_running_loop().time()

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            seconds = asyncio.get_running_loop().time() - self._started
            self._in_flight.adapt(self._num_sent, seconds)
        self._in_flight.leave()


class DisconnectGuard:
    """Ends a block with :class:`ClientGone` when the client closes the connection.

    The task is cancelled, as by ``asyncio.timeout``. That is cheaper than a task which watches.
    """

    def __init__(self) -> None:
        self._has_left = False
        self._task: asyncio.Task[object] | None = None

    def note(self) -> None:
        """The client has left."""
        self._has_left = True
        if self._task is not None:
            self._task.cancel()

    def __enter__(self) -> None:
        if self._has_left:
            raise ClientGone
        self._task = asyncio.current_task()
        assert self._task is not None
        self._num_cancelled = self._task.cancelling()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        task, self._task = self._task, None
        assert task is not None
        if (
            self._has_left
            and task.uncancel() <= self._num_cancelled
            and kind is asyncio.CancelledError
        ):
            raise ClientGone from None


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
