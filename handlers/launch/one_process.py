"""The launcher of an engine that is one process, which starts all others itself."""

from __future__ import annotations

import subprocess
import sys
from typing import ClassVar

from handlers.front.settings import FrontSettings
from handlers.launch.engines import Plan
from handlers.processes.environment import child_environment
from handlers.processes.run_folder import RunFolder
from handlers.processes.supervision import DEATHS_WITHIN_S, Child, Supervisor


class OneProcess:
    """An :class:`handlers.launch.engines.Engine`, except for ``start``.

    Attributes:
        drain_s: seconds that the process may take to end once it is asked to.
        deaths_within_s: see :class:`handlers.processes.supervision.Child`.
    """

    drain_s: ClassVar[float]
    deaths_within_s: ClassVar[float] = DEATHS_WITHIN_S

    def __init__(self, plan: Plan, folder: RunFolder, supervisor: Supervisor) -> None:
        self._plan = plan
        self._supervisor = supervisor
        self._settings = folder.path / "front.json"
        self._child: Child

    def _start(self, module: str, settings: FrontSettings, **variables: str) -> None:
        """Run a module, whose argument is the file with its settings."""
        self._plan.logs.mkdir(exist_ok=True)
        settings.save(self._settings)
        command = [sys.executable, "-m", module, str(self._settings)]
        environment = child_environment(**variables)
        output = self._plan.logs / "front.out"  # with the tracebacks that clients never see
        self._child = self._supervisor.start(
            "front",
            command,
            environment,
            restarts=True,
            output=output,
            deaths_within_s=self.deaths_within_s,
        )

    def drain(self) -> None:
        """Ask the process to stop, which it does once everything accepted is answered."""
        self._child.process.terminate()
        try:
            self._child.process.wait(self.drain_s)
        except subprocess.TimeoutExpired:
            return  # the supervisor kills it

    def is_whole(self) -> bool:
        """Whether the process could be started again."""
        return self._settings.exists()
