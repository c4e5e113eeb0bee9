"""The release that answers, and its replacement by the next.

A request is answered by one release as a whole. The release is chosen when the body has arrived, so
that a slow upload does not keep an old release alive.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from handlers.front.admission import Limits
from handlers.front.front import Endpoint, Request

logger = logging.getLogger(__name__)
# Added to the longest time that accepted requests of a replaced release may take.
SPARE_S = 5.0


class Backend(Protocol):
    """What answers for one release."""

    def api(self, path: str) -> Endpoint:
        """The endpoint at a path.

        Raises:
            ApiError: there is none.
        """

    def refuse(self) -> None:
        """Answer 503 to requests that wait for a worker and to all further ones."""


@dataclass(frozen=True)
class Release:
    """Bundles that are served together.

    Attributes:
        number: counts the releases of a service.
        bundles: their folders, the first served under the plain names.
        models: the identity of each bundle, ``NAME@HASH``.
        digests: of each bundle, :attr:`serving.engine.bundle.Bundle.digest`.
    """

    number: int
    bundles: tuple[str, ...]
    models: tuple[str, ...]
    digests: tuple[str, ...]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Release:
        """The inverse of ``dataclasses.asdict``, also after JSON made lists of tuples."""
        return cls(
            int(values["number"]),
            tuple(values["bundles"]),
            tuple(values["models"]),
            tuple(values["digests"]),
        )


B = TypeVar("B", bound=Backend)


class _Running(Generic[B]):
    """A release with its backend. It keeps running while a request has entered it."""

    def __init__(
        self, release: Release, backend: B, stack: contextlib.AsyncExitStack, drain_s: float
    ) -> None:
        self.release = release
        self.backend = backend
        self.stack = stack
        self._drain_s = drain_s
        self._num_requests = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self.endpoints: dict[str, Endpoint] = {}  # those of workers, at their few paths

    def __enter__(self) -> None:
        self._num_requests += 1
        self._idle.clear()

    def __exit__(self, *_: object) -> None:
        self._num_requests -= 1
        if not self._num_requests:
            self._idle.set()

    async def drain(self) -> None:
        """Finish what was accepted, for a while, and stop."""
        try:
            async with asyncio.timeout(self._drain_s):
                await self._idle.wait()
        except TimeoutError:
            logger.error("release %d is stopped with requests left", self.release.number)
        finally:
            await self.stack.aclose()


class CurrentRelease(Generic[B]):
    """Routes requests to the release of a service.

    Args:
        build: starts what answers for a release, and stops it at the end of the context.
        save: called with the next release before requests are routed to it.
        limits: how long a request may take that a release has accepted.
    """

    def __init__(
        self,
        build: Callable[[Release], AbstractAsyncContextManager[B]],
        save: Callable[[Release], None],
        limits: Limits,
    ) -> None:
        self._build = build
        self._save = save
        self._drain_s = limits.waiting_s + limits.upstream_s + SPARE_S
        self._running: _Running[B]
        self._publishing = asyncio.Lock()
        self._draining = set[asyncio.Task[None]]()

    @property
    def release(self) -> Release:
        """The release that answers."""
        return self._running.release

    @property
    def backend(self) -> B:
        """What answers for it."""
        return self._running.backend

    @contextlib.asynccontextmanager
    async def run(self, release: Release) -> AsyncIterator[None]:
        """Run a release during the block, or those that are published meanwhile.

        Raises:
            Exception: it cannot be started.
        """
        self._running = await self._start(release)
        try:
            yield
        finally:
            for task in self._draining:
                task.cancel()
            await asyncio.gather(*self._draining, return_exceptions=True)
            await self._running.stack.aclose()

    async def publish(self, release: Release) -> None:
        """Start a release, and route requests to it. The one before finishes what it accepted.

        Raises:
            Exception: it cannot be started. What answers has not changed.
        """
        async with self._publishing:
            next_one = await self._start(release)
            try:
                self._save(release)
            except BaseException:
                await next_one.stack.aclose()
                raise
            former, self._running = self._running, next_one
        task = asyncio.create_task(former.drain())
        self._draining.add(task)
        task.add_done_callback(self._draining.discard)

    def api(self, path: str) -> Endpoint:
        """The endpoint at a path; its ``route`` is that of the release when the body has arrived.

        Raises:
            ApiError: there is none.
        """
        running = self._running
        if path in running.endpoints:
            return running.endpoints[path]
        endpoint = running.backend.api(path)
        if endpoint.in_flight is None:  # not computed by workers
            return endpoint
        running.endpoints[path] = dataclasses.replace(
            endpoint, route=functools.partial(self._route, path), hold=running
        )
        return running.endpoints[path]

    def refuse(self) -> None:
        """See :class:`Backend`."""
        self._running.backend.refuse()

    def _route(self, path: str, request: Request) -> Endpoint:
        return self.api(path)

    async def _start(self, release: Release) -> _Running[B]:
        stack = contextlib.AsyncExitStack()
        backend = await stack.enter_async_context(self._build(release))
        return _Running(release, backend, stack, self._drain_s)
