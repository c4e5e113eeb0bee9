"""Starts the ASGI application, changes its releases, and lets it finish what it accepted."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from handlers.front.releases import Release
from handlers.launch.engines import SWITCHED, Plan
from handlers.processes.channel import DESCRIBE_S, ChannelError, RefusedError, Say, ask
from handlers.processes.one_process import OneProcess
from handlers.processes.run_folder import RunFolder
from handlers.processes.supervision import Supervisor
from handlers.processes.watchdog import end_if_it_hangs
from handlers.service.application import STOP_S, ApplicationSettings
from handlers.service.control import CHANGE, DESCRIBE


class Asgi(OneProcess):
    """An :class:`handlers.launch.engines.UpgradableEngine`."""

    drain_s = STOP_S + 5

    def __init__(self, plan: Plan, folder: RunFolder, supervisor: Supervisor) -> None:
        super().__init__(plan, folder, supervisor)
        self._control = folder.front_socket

    def start(self) -> None:
        """Start the application; its process starts the workers and then listens."""
        plan = self._plan
        settings = ApplicationSettings(
            **plan.front,
            releases=(dataclasses.asdict(plan.release),),
            workers=plan.workers,
            options=dataclasses.asdict(plan.options),
            logs=str(plan.logs),
            memory=str(plan.memory),
            control=str(self._control),
        )
        self._start("handlers.service.application", settings)
        end_if_it_hangs(self._child, plan.ports.metrics, self._supervisor)

    def change(self, releases: Sequence[Release], say: Say) -> None:
        """See :meth:`handlers.launch.engines.UpgradableEngine.change`."""
        message = {"do": CHANGE, "releases": [dataclasses.asdict(one) for one in releases]}
        try:
            ask(self._control, message, say)
        except RefusedError:
            raise
        except ChannelError:
            kept = ApplicationSettings.load(self._settings).releases
            if [one["number"] for one in kept] != [one.number for one in releases]:
                raise
            say(SWITCHED)  # the front was killed, and is started again with the new releases

    def releases(self) -> list[dict[str, Any]]:
        """See :meth:`handlers.launch.engines.UpgradableEngine.releases`."""
        return list(ask(self._control, {"do": DESCRIBE}, seconds=DESCRIBE_S)["releases"])


ENGINE = Asgi
