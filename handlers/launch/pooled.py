"""Starts the application, publishes releases in it, and lets it finish what it accepted."""

from __future__ import annotations

import dataclasses
from typing import Any

from handlers.launch.engines import Plan
from handlers.launch.one_process import OneProcess
from handlers.processes.channel import DESCRIBE_S, ChannelError, RefusedError, ask
from handlers.processes.run_folder import RunFolder
from handlers.processes.supervision import Supervisor
from handlers.processes.watchdog import end_if_it_hangs
from handlers.service.application import STOP_S, ApplicationSettings
from handlers.service.control import DESCRIBE, PUBLISH
from handlers.service.release import Release


class PooledEngine(OneProcess):
    """An :class:`handlers.launch.engines.PublishingEngine` over any pool.

    Args:
        pool: see :class:`handlers.service.application.ApplicationSettings`.
        plan, folder, supervisor: of the service.
    """

    drain_s = STOP_S + 5

    def __init__(self, pool: str, plan: Plan, folder: RunFolder, supervisor: Supervisor) -> None:
        super().__init__(plan, folder, supervisor)
        self._pool = pool
        self._folder = folder

    def start(self) -> None:
        """Start the application; its process starts the pool and then listens."""
        plan = self._plan
        settings = ApplicationSettings(
            **plan.front,
            pool=self._pool,
            release=dataclasses.asdict(plan.release),
            workers=plan.workers,
            options=dataclasses.asdict(plan.options),
            logs=str(plan.logs),
            folder=str(self._folder.path),
        )
        self._start("handlers.service.application", settings)
        end_if_it_hangs(self._child, plan.ports.metrics, self._supervisor)

    def publish(self, release: Release) -> None:
        """See :meth:`handlers.launch.engines.PublishingEngine.publish`."""
        try:
            ask(self._folder.front_socket, {"do": PUBLISH, "release": dataclasses.asdict(release)})
        except RefusedError:
            raise
        except ChannelError:  # the front was killed: it may start again with the new release
            kept = ApplicationSettings.load(self._settings).release
            if kept["number"] != release.number:
                raise

    def describe(self) -> dict[str, Any]:
        """See :meth:`handlers.launch.engines.PublishingEngine.describe`."""
        return ask(self._folder.front_socket, {"do": DESCRIBE}, seconds=DESCRIBE_S)
