"""Starts the page of a service, and waits until all parts answer."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import httpx

from handlers.launch.engines import Plan
from handlers.launch.environment import child_environment
from handlers.launch.run_folder import RunFolder
from handlers.launch.supervision import Child, LaunchError, Supervisor
from serving.ports import Ports, local_address

START_TIMEOUT_S = 240.0


def start_page(plan: Plan, folder: RunFolder, supervisor: Supervisor) -> Child:
    """Start the web page, which uses the service over HTTP on loopback."""
    files = folder.path / "page-files"
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
    command = [
        sys.executable,
        "-m",
        "serving.page.app",
        *(str(bundle.folder) for bundle in plan.bundles),
        "--url",
        inference_url(plan.ports, plan.host),
        "--host",
        plan.host,
        "--port",
        str(plan.ports.ui),
    ]
    if plan.allowed_hosts:
        command += ["--allowed-hosts", *plan.allowed_hosts]
    return supervisor.start("page", command, environment, restarts=True)


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
        return (
            httpx.get(f"http://{local_address(host)}:{ports.ui}/readyz", timeout=30).status_code
            == 200
        )
    except httpx.TransportError:
        return False
