"""Starts the process of the application, publishes releases in it, and lets it finish."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ade_base.ports import Ports
from handlers.launch.engines import ENGINES
from handlers.processes.channel import DESCRIBE_S, ChannelError, RefusedError, ask
from handlers.processes.environment import child_environment
from handlers.processes.run_folder import RunFolder
from handlers.processes.supervision import Child, Supervisor
from handlers.processes.watchdog import end_if_it_hangs
from handlers.service.application import STOP_S, ApplicationSettings
from handlers.service.control import DESCRIBE, PUBLISH
from handlers.service.options import ServingOptions
from handlers.service.release import Release
from serving.engine.bundle import Bundle

DRAIN_S = STOP_S + 5  # that the process may take to end once it is asked to


@dataclass(frozen=True)
class Plan:
    """The bundles to serve, how, and where.

    Attributes:
        bundles: the bundles, the first served under the plain names.
        options: how workers compute.
        workers: processes of each bundle, by operation.
        host: of the API and the page.
        ports: ports of all parts.
        exposes_metrics: whether the metrics are served on ``host`` too.
        token: the token that clients must send, if any.
        allowed_hosts: names of the host, besides addresses.
        probe_secret: marks health checks, which are not counted as traffic.
        logs: a folder, which may not exist yet.
        engine: a name of :data:`handlers.launch.engines.ENGINES`.
    """

    bundles: list[Bundle]
    options: ServingOptions
    workers: dict[str, int]
    host: str
    ports: Ports
    exposes_metrics: bool
    token: str | None = field(repr=False)
    allowed_hosts: list[str]
    probe_secret: str = field(repr=False)
    logs: Path
    engine: str

    @property
    def front(self) -> dict[str, Any]:
        """The fields of :class:`handlers.front.settings.FrontSettings`."""
        return {
            "host": self.host,
            "port": self.ports.inference,
            "metrics_port": self.ports.metrics,
            "exposes_metrics": self.exposes_metrics,
            "token": self.token,
            "allowed_hosts": tuple(self.allowed_hosts),
            "probe_secret": self.probe_secret,
        }

    @property
    def release(self) -> Release:
        """The first release, which is that of the bundles."""
        return release_of(1, self.bundles)


def release_of(number: int, bundles: Sequence[Bundle]) -> Release:
    """A release of bundles; see :class:`handlers.service.release.Release`."""
    return Release(
        number,
        tuple(str(bundle.folder) for bundle in bundles),
        tuple(bundle.model_id for bundle in bundles),
        tuple(bundle.digest for bundle in bundles),
    )


class Launcher:
    """The API's part of a service: the application's process, which starts the pool of an engine.

    Args:
        plan, folder, supervisor: of the service.
    """

    def __init__(self, plan: Plan, folder: RunFolder, supervisor: Supervisor) -> None:
        self._plan = plan
        self._folder = folder
        self._supervisor = supervisor
        self._settings = folder.path / "front.json"
        self._child: Child

    def start(self) -> None:
        """Start the application; its process starts the pool and then listens."""
        plan, engine = self._plan, ENGINES[self._plan.engine]
        plan.logs.mkdir(exist_ok=True)
        ApplicationSettings(
            **plan.front,
            pool=engine.code,
            release=dataclasses.asdict(plan.release),
            workers=plan.workers,
            options=dataclasses.asdict(plan.options),
            logs=str(plan.logs),
            folder=str(self._folder.path),
        ).save(self._settings)
        own = {n: value for n, value in os.environ.items() if n.startswith(engine.variables)}
        self._child = self._supervisor.start(
            "front",
            [sys.executable, "-m", "handlers.service.application", str(self._settings)],
            child_environment(**own),
            restarts=True,
            output=plan.logs / "front.out",  # with the tracebacks that clients never see
        )
        end_if_it_hangs(self._child, plan.ports.metrics, self._supervisor)

    def drain(self) -> None:
        """Ask the process to stop, which it does once everything accepted is answered."""
        self._child.process.terminate()
        try:
            self._child.process.wait(DRAIN_S)
        except subprocess.TimeoutExpired:
            return  # the supervisor kills it

    def is_whole(self) -> bool:
        """Whether the process could be started again."""
        return self._settings.exists()

    def publish(self, release: Release) -> None:
        """Start a release, and route requests to it once it can answer; the old one drains.

        Raises:
            ChannelError: it cannot be started; nothing has changed.
        """
        try:
            ask(self._folder.front_socket, {"do": PUBLISH, "release": dataclasses.asdict(release)})
        except RefusedError:
            raise
        except ChannelError:  # the front was killed: it may start again with the new release
            kept = ApplicationSettings.load(self._settings).release
            if kept["number"] != release.number:
                raise

    def describe(self) -> dict[str, Any]:
        """The fields of the release, and its ``workers`` by model.

        Raises:
            ChannelError: the application does not answer.
        """
        return ask(self._folder.front_socket, {"do": DESCRIBE}, seconds=DESCRIBE_S)
