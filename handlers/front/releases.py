"""The releases between which a front chooses.

One release answers; while the service is upgraded, there is another beside it.
A request is answered by one release as a whole. The release is chosen when the body has arrived, so
that a slow upload does not keep an old release alive.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import logging
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from handlers.front.admission import Limits
from handlers.front.front import Endpoint, Request

logger = logging.getLogger(__name__)
# Added to the longest time that accepted requests of a removed release may take.
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

    def is_ready(self) -> bool:
        """Whether something can compute the answers of each model."""


@dataclass(frozen=True)
class Release:
    """Bundles that are served together.

    Attributes:
        number: counts the releases of a service.
        bundles: their folders, the first served under the plain names.
        models: the identity of each bundle, ``NAME@HASH``.
        digests: of each bundle, :attr:`serving.engine.bundle.Bundle.digest`.
        share: of the requests, above 0 and below 1, for a release beside the first of a list. The
            first gets all others, whatever its share.
    """

    number: int
    bundles: tuple[str, ...]
    models: tuple[str, ...]
    digests: tuple[str, ...]
    share: float = 0.0

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Release:
        """The inverse of ``dataclasses.asdict``, also after JSON made lists of tuples."""
        return cls(
            int(values["number"]),
            tuple(values["bundles"]),
            tuple(values["models"]),
            tuple(values["digests"]),
            float(values["share"]),
        )


B = TypeVar("B", bound=Backend)


class Running(Generic[B]):
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

    async def close(self) -> None:
        """Finish what was accepted, for a while, and stop."""
        try:
            async with asyncio.timeout(self._drain_s):
                await self._idle.wait()
        except TimeoutError:
            logger.error("release %d is stopped with requests left", self.release.number)
        await self.stack.aclose()


class Releases(Generic[B]):
    """Routes requests to the releases of a service.

    Args:
        build: starts what answers for a release, and stops it at the end of the context.
        save: called with the new list before requests are routed by it.
        limits: how long a request may take that a release has accepted.
    """

    def __init__(
        self,
        build: Callable[[Release], AbstractAsyncContextManager[B]],
        save: Callable[[Sequence[Release]], None],
        limits: Limits,
    ) -> None:
        self._build = build
        self._save = save
        self._drain_s = limits.waiting_s + limits.upstream_s + SPARE_S
        self._running: list[Running[B]] = []
        self._changing = asyncio.Lock()
        self._joining: asyncio.Task[None]
        self._others: Sequence[Release] = ()  # that join

    @property
    def backends(self) -> list[tuple[Release, B]]:
        """What answers, the first with all requests that the shares of the others leave."""
        return [(one.release, one.backend) for one in self._running]

    @contextlib.asynccontextmanager
    async def run(self, releases: Sequence[Release]) -> AsyncIterator[None]:
        """Run releases during the block.

        Those beside the first join as soon as they are started. One that cannot be started is left
        out.

        Raises:
            Exception: the first cannot be started.
        """
        self._running = [await self._start(releases[0])]
        self._others = releases[1:]
        self._joining = asyncio.create_task(self._join(self._others))
        try:
            yield
        finally:
            self._joining.cancel()
            await asyncio.gather(self._joining, return_exceptions=True)
            await asyncio.gather(*(one.stack.aclose() for one in self._running))

    async def _join(self, releases: Sequence[Release]) -> None:
        async with self._changing:
            for release in releases:
                try:
                    self._running = [*self._running, await self._start(release)]
                except Exception as error:
                    logger.error("release %d was left out: %s", release.number, error)
            if len(self._running) <= len(releases):
                try:
                    self._save([one.release for one in self._running])
                except OSError as error:
                    logger.error("the releases cannot be saved: %s", error)

    async def change(self, releases: Sequence[Release]) -> list[Running[B]]:
        """Start the new ones of a list and route requests by it from then on.

        If another one is still being started since :meth:`run`, it is given up at once: it may
        hang.

        Args:
            releases: those of a number that runs already get their new share.

        Returns:
            Those that get no further requests, for :meth:`drain`.

        Raises:
            Exception: a release cannot be started, or the first cannot answer although it runs
                already. What answers has not changed.
        """
        if not {one.number for one in self._others} <= {one.number for one in releases}:
            self._joining.cancel()
        async with self._changing:
            known = {one.release.number: one for one in self._running}
            started: list[Running[B]] = []
            try:
                for release in releases:
                    if release.number not in known:
                        known[release.number] = await self._start(release)
                        started.append(known[release.number])
                first = known[releases[0].number]
                if first is not self._running[0] and not first.backend.is_ready():
                    raise RuntimeError(
                        f"{', '.join(first.release.models)} has an operation without a worker that "
                        "can compute, front.out has the reason"
                    )
                self._save(releases)
            except BaseException:
                await asyncio.gather(*(one.stack.aclose() for one in started))
                raise
            for release in releases:
                known[release.number].release = release
            removed = [one for one in self._running if one.release not in releases]
            self._running = [known[release.number] for release in releases]
            return removed

    async def drain(self, removed: Sequence[Running[B]]) -> None:
        """Stop releases once they have answered what they accepted."""
        await asyncio.gather(*(one.close() for one in removed))

    def api(self, path: str) -> Endpoint:
        """The endpoint at a path of the first release; its ``route`` chooses between all of them.

        Raises:
            ApiError: there is none.
        """
        return self._endpoint(self._running[0], path)

    def refuse(self) -> None:
        """Of all releases, see :class:`Backend`."""
        for one in self._running:
            one.backend.refuse()

    async def _start(self, release: Release) -> Running[B]:
        stack = contextlib.AsyncExitStack()
        backend = await stack.enter_async_context(self._build(release))
        return Running(release, backend, stack, self._drain_s)

    def _route(self, path: str, request: Request) -> Endpoint:
        return self._endpoint(self._choose(path, request), path)

    def _endpoint(self, one: Running[B], path: str) -> Endpoint:
        if path in one.endpoints:
            return one.endpoints[path]
        endpoint = one.backend.api(path)
        if endpoint.lane is None:  # not computed by workers
            return endpoint
        one.endpoints[path] = dataclasses.replace(
            endpoint, route=functools.partial(self._route, path), hold=one
        )
        return one.endpoints[path]

    def _choose(self, path: str, request: Request) -> Running[B]:
        first, *others = self._running
        if request.model:
            named = [one for one in self._running if one.backend.api(path).model == request.model]
            return (named or [first])[0]
        if request.is_probe:  # a health check is of the release that has the others
            return first
        point = random.random()
        for other in others:
            point -= other.release.share
            if point < 0:
                return other
        return first
