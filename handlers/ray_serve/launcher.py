"""Starts the process that serves on Ray, and lets it finish what it accepted."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
import sys

from handlers.asgi.metrics import ANSWER_SECONDS, QUEUE_SECONDS
from handlers.launch.engines import Plan
from handlers.launch.environment import child_environment
from handlers.launch.run_folder import RunFolder
from handlers.launch.supervision import Child, Supervisor
from handlers.ray_serve.driver import DriverSettings
from handlers.ray_serve.environment import of_cluster

if importlib.util.find_spec("ray") is None:  # it takes a second to import
    raise ModuleNotFoundError("--engine ray", name="ray")
DRAIN_S = 40  # of the front and then of the replicas


class RayServe:
    """An :class:`handlers.launch.engines.Engine`."""

    timers = {ANSWER_SECONDS.name: "whole", QUEUE_SECONDS.name: "queue"}

    def __init__(self, plan: Plan, folder: RunFolder, supervisor: Supervisor) -> None:
        self._plan = plan
        self._supervisor = supervisor
        self._settings = folder.path / "front.json"
        self._driver: Child

    def start(self) -> None:
        """Start the driver; it starts Ray and the replicas, and then listens."""
        plan = self._plan
        plan.logs.mkdir(exist_ok=True)
        DriverSettings(
            host=plan.host,
            port=plan.ports.inference,
            metrics_port=plan.ports.metrics,
            exposes_metrics=plan.exposes_metrics,
            token=plan.token,
            allowed_hosts=tuple(plan.allowed_hosts),
            probe_secret=plan.probe_secret,
            bundles=tuple(str(bundle.folder) for bundle in plan.bundles),
            workers=plan.workers,
            options=dataclasses.asdict(plan.options),
            logs=str(plan.logs),
            address=plan.address,
        ).save(self._settings)
        command = [sys.executable, "-m", "handlers.ray_serve.driver", str(self._settings)]
        environment = child_environment(**(of_cluster(os.environ) if plan.address else {}))
        self._driver = self._supervisor.start("front", command, environment, restarts=True)

    def open(self) -> None:
        """Nothing is left to start."""

    def drain(self) -> None:
        """Ask the driver to stop, which it does once everything accepted is answered."""
        self._driver.process.terminate()
        try:
            self._driver.process.wait(DRAIN_S)
        except subprocess.TimeoutExpired:
            return  # the supervisor kills it, and the guard what it started

    def is_whole(self) -> bool:
        """Whether the driver could be started again."""
        return self._settings.exists()


ENGINE = RayServe
