"""Starts and replaces the page of a service, and waits until all parts answer."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx

from ade_base.ports import Ports, local_address
from handlers.launch.launcher import Plan
from handlers.processes.environment import child_environment
from handlers.processes.run_folder import RunFolder
from handlers.processes.supervision import Child, LaunchError, Supervisor

START_TIMEOUT_S = 240.0


class Page:
    """The web page, which uses the service over HTTP on loopback.

    This process holds the socket, so that connections are not refused while a page of other
    bundles replaces the present one.

    Args:
        plan: of the service.
        folder: where the page keeps its files.
        supervisor: runs its process.

    Raises:
        PortError: the port was taken since it was checked.
    """

    def __init__(self, plan: Plan, folder: RunFolder, supervisor: Supervisor) -> None:
        self._plan = plan
        self._folder = folder.path
        self._supervisor = supervisor
        self._socket = plan.ports.bound("ui", plan.host)  # the first page listens when it is built
        self._child: Child
        self._files: Path  # of the child: uploads and results
        self._num_started = 0

    def start(self) -> None:
        """Start the page of the plan's bundles."""
        bundles = [str(bundle.folder) for bundle in self._plan.bundles]
        self._child, self._files = self._start(bundles)

    def show(self, bundles: Sequence[str]) -> None:
        """Replace the page by one of other bundles. Connections wait until it has started.

        Args:
            bundles: their folders.

        Raises:
            LaunchError: the service is being stopped.
        """
        self._supervisor.stop(self._child)
        shutil.rmtree(self._files, ignore_errors=True)
        self._child, self._files = self._start(bundles)

    def _start(self, bundles: Sequence[str]) -> tuple[Child, Path]:
        """Start a page; returns its process, and the folder of its files."""
        plan = self._plan
        self._num_started += 1
        number = "" if self._num_started == 1 else f"-{self._num_started}"
        files = self._folder / f"page-files{number}"
        files.mkdir(mode=0o700)
        environment = child_environment(
            GRADIO_ANALYTICS_ENABLED="False",
            HF_HUB_OFFLINE="1",
            OMP_NUM_THREADS="1",
            GRADIO_TEMP_DIR=str(files),
            ADE_PROBE_SECRET=plan.probe_secret,
        )
        if plan.token is not None:
            environment["ADE_TOKEN"] = plan.token
        command = [sys.executable, "-m", "serving.page.app", *bundles]
        command += ["--url", inference_url(plan.ports, plan.host), "--host", plan.host]
        command += ["--port", str(plan.ports.ui), "--socket", str(self._socket.fileno())]
        if plan.allowed_hosts:
            command += ["--allowed-hosts", *plan.allowed_hosts]
        child = self._supervisor.start(
            "page",
            command,
            environment,
            restarts=True,
            pass_fds=(self._socket.fileno(),),
        )
        return child, files


def inference_url(ports: Ports, host: str) -> str:
    """The URL at which this machine reaches the service."""
    return f"http://{local_address(host)}:{ports.inference}"


def wait_until(ready: Callable[[], bool], supervisor: Supervisor) -> None:
    """Wait for a condition while the children run.

    Raises:
        LaunchError: a child ended, or it took too long. The message has the children's last output.
    """
    deadline = time.monotonic() + START_TIMEOUT_S
    while not ready():
        supervisor.tend(restarts=False)
        if time.monotonic() > deadline:
            raise LaunchError(f"not ready after {START_TIMEOUT_S:.0f} s\n{supervisor.tails()}")
        time.sleep(0.1)


def page_is_ready(ports: Ports, host: str) -> bool:
    """Whether the page's ``/readyz`` reports that all operations answer."""
    try:
        url = f"http://{local_address(host)}:{ports.ui}/readyz"
        return httpx.get(url, timeout=30, trust_env=False).status_code == 200  # without a proxy
    except httpx.TransportError:
        return False
