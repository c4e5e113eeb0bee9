"""Starts the ASGI application, changes its releases, and lets it finish what it accepted."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from handlers.asgi.application import STOP_S, ApplicationSettings
from handlers.asgi.control import CHANGE, DESCRIBE
from handlers.asgi.metrics import ANSWER_SECONDS, QUEUE_SECONDS
from handlers.front.releases import Release
from handlers.launch.channel import ChannelError, Say, ask
from handlers.launch.engines import SWITCHED, Plan
from handlers.launch.environment import child_environment
from handlers.launch.run_folder import RunFolder
from handlers.launch.supervision import Child, Supervisor


class Asgi:
    """An :class:`handlers.launch.engines.UpgradableEngine`."""

    timers = {ANSWER_SECONDS.name: "whole", QUEUE_SECONDS.name: "queue"}

    def __init__(self, plan: Plan, folder: RunFolder, supervisor: Supervisor) -> None:
        self._plan = plan
        self._supervisor = supervisor
        self._settings = folder.path / "front.json"
        self._control = folder.front_socket
        self._front: Child

    def start(self) -> None:
        """Start the application; its process starts the workers and then listens."""
        plan = self._plan
        plan.logs.mkdir(exist_ok=True)
        ApplicationSettings(
            host=plan.host,
            port=plan.ports.inference,
            metrics_port=plan.ports.metrics,
            exposes_metrics=plan.exposes_metrics,
            token=plan.token,
            allowed_hosts=tuple(plan.allowed_hosts),
            probe_secret=plan.probe_secret,
            releases=(dataclasses.asdict(plan.release),),
            workers=plan.workers,
            options=dataclasses.asdict(plan.options),
            logs=str(plan.logs),
            control=str(self._control),
        ).save(self._settings)
        command = [sys.executable, "-m", "handlers.asgi.application", str(self._settings)]
        self._front = self._supervisor.start("front", command, child_environment(), restarts=True)

    def open(self) -> None:
        """Nothing is left to start."""

    def change(self, releases: Sequence[Release], say: Say) -> None:
        """See :meth:`handlers.launch.engines.UpgradableEngine.change`."""
        message = {"do": CHANGE, "releases": [dataclasses.asdict(one) for one in releases]}
        try:
            ask(self._control, message, say)
        except ChannelError:
            kept = ApplicationSettings.load(self._settings).releases
            if [one["number"] for one in kept] != [one.number for one in releases]:
                raise
            say(SWITCHED)  # the front was killed, and is started again with the new releases

    def releases(self) -> list[dict[str, Any]]:
        """See :meth:`handlers.launch.engines.UpgradableEngine.releases`."""
        return list(ask(self._control, {"do": DESCRIBE})["releases"])

    def drain(self) -> None:
        """Ask the application to stop, which it does once it has answered what it accepted."""
        self._front.process.terminate()
        try:
            self._front.process.wait(STOP_S + 5)
        except subprocess.TimeoutExpired:
            return  # the supervisor kills it

    def is_whole(self) -> bool:
        """Whether the application could be started again."""
        return self._settings.exists()


ENGINE = Asgi
