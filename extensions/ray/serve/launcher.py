"""Starts the process that serves on Ray, and lets it finish what it accepted."""

from __future__ import annotations

import dataclasses
import importlib.util
import os

from extensions.ray.serve.driver import DriverSettings
from extensions.ray.serve.environment import of_cluster
from handlers.launch.one_process import OneProcess

if importlib.util.find_spec("ray") is None:  # it takes a second to import
    raise ModuleNotFoundError("--engine ray", name="ray")


class RayServe(OneProcess):
    """An :class:`handlers.launch.engines.Engine`. A guard ends what a killed driver had started."""

    drain_s = 40  # of the front and then of the replicas
    deaths_within_s = 600.0  # a driver may wait a minute for what the one before had deployed

    def start(self) -> None:
        """Start the driver; it starts Ray and the replicas, and then listens."""
        plan = self._plan
        logs: str | None = str(plan.logs)
        if plan.address and plan.logs.is_relative_to(self._settings.parent):
            logs = None  # this service's own folder is of no use to other machines and users
        settings = DriverSettings(
            **plan.front,
            bundles=tuple(str(bundle.folder) for bundle in plan.bundles),
            workers=plan.workers,
            options=dataclasses.asdict(plan.options),
            logs=logs,
            address=plan.address,
        )
        variables = of_cluster(os.environ) if plan.address else {}
        self._start("extensions.ray.serve.driver", settings, **variables)
