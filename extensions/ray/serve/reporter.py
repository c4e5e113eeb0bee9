"""Measurements of all replicas, brought together in one place."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from handlers.service.metrics import Labels, Metrics

logger = logging.getLogger(__name__)
EVERY_S = 1.0
SILENT_S = 30.0  # a replica reports its gauges more often
SEND_S = 3.0  # the sum's replica may have ended
Measured = list[tuple[str, dict[str, str], float]]  # name, labels and value


class MetricsReplica:
    """Sums what all replicas measure. There is one; what it counted is lost if it ends."""

    def __init__(self) -> None:
        self._refusals = Counter[str]()
        self._metrics = Metrics(self._refusals)
        self._writers: dict[tuple[str, Labels], str] = {}
        self._heard: dict[str, float] = {}  # when each reporter sent something

    async def update(self, measured: Measured, refusals: Mapping[str, int], reporter: str) -> None:
        """Add what a reporter measured, and requests that it refused by the code of the error."""
        self._heard[reporter] = time.monotonic()
        for name, labels, value in measured:
            self._metrics.update(name, labels, value)
            self._writers[name, tuple(labels.items())] = reporter
        self._refusals.update(refusals)

    async def leave(self, reporter: str) -> None:
        """Drop the gauges that a reporter was the last to set: what they describe has ended."""
        for key in [key for key, its in self._writers.items() if its == reporter]:
            name, labels = key
            self._metrics.drop_gauge(name, dict(labels))
            del self._writers[key]
        self._heard.pop(reporter, None)

    async def text(self) -> str:
        """In Prometheus's text format."""
        now = time.monotonic()
        for silent in [one for one, at in self._heard.items() if now - at > SILENT_S]:
            await self.leave(silent)  # it died; one that lives reports its gauges again
        return self._metrics.text()


class Reporter:
    """Sends the measurements of one replica every second.

    Args:
        metrics: handle of :class:`MetricsReplica`.
        collect: returns what was measured, and what was refused, since its last call.
    """

    def __init__(
        self, metrics: Any, collect: Callable[[], tuple[Measured, Mapping[str, int]]]
    ) -> None:
        self._metrics = metrics
        self._id = uuid.uuid4().hex
        self._collect = collect
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        while True:
            await self.send()
            await asyncio.sleep(EVERY_S)

    async def send(self) -> None:
        """Send what there is. What cannot be sent is lost: twice would be worse."""
        try:
            measured, refusals = self._collect()
            if measured or refusals:
                async with asyncio.timeout(SEND_S):
                    await self._metrics.update.remote(measured, refusals, self._id)
        except Exception as error:
            logger.warning("measurements were lost: %s", error)

    async def stop(self) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        await self.send()
        with contextlib.suppress(Exception):  # nobody is left who could be told
            async with asyncio.timeout(SEND_S):
                await self._metrics.leave.remote(self._id)
