"""Starts the processes of a service, waits until they answer, and drains them before a stop."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from handlers.torchserve.environment import child_environment
from handlers.torchserve.run_folder import RunFolder
from handlers.torchserve.status import queued_requests
from handlers.torchserve.supervision import Child, LaunchError, Supervisor
from serving.ports import Ports, local_address

START_TIMEOUT_S = 240.0
DRAIN_TIMEOUT_S = 30.0


def drain(folder: RunFolder, workers: int, server: Child) -> None:
    """Let the workers finish the accepted requests.

    Waits until the queues are empty, then makes workers reject further requests, and waits until
    all of them are idle.

    Args:
        folder: of the service.
        workers: number of workers.
        server: TorchServe's process; if it has ended, this returns at once.
    """
    deadline = time.monotonic() + DRAIN_TIMEOUT_S
    while (
        server.process.poll() is None
        and time.monotonic() < deadline - DRAIN_TIMEOUT_S / 2
        and queued_requests(folder)
    ):
        time.sleep(0.1)
    folder.stop_folder.mkdir()
    while (
        server.process.poll() is None
        and time.monotonic() < deadline
        and len(list(folder.stop_folder.iterdir())) < workers
    ):
        time.sleep(0.1)


def start_front(supervisor: Supervisor, settings: Path) -> Child:
    """Start the HTTP front, the only process of the API that listens on TCP."""
    command = [sys.executable, "-m", "handlers.torchserve.front", str(settings)]
    return supervisor.start("front", command, child_environment(), restarts=True)


def start_page(
    supervisor: Supervisor,
    folder: RunFolder,
    ports: Ports,
    host: str,
    bundles: list[Path],
    token: str | None,
    probe_secret: str,
    allowed_hosts: list[str],
) -> Child:
    """Start the web page, which uses the service over HTTP on loopback."""
    files = folder.path / "page-files"
    files.mkdir(mode=0o700)
    environment = child_environment(
        GRADIO_ANALYTICS_ENABLED="False",
        HF_HUB_OFFLINE="1",
        OMP_NUM_THREADS="1",
        GRADIO_TEMP_DIR=str(files),
        ADE_PROBE_SECRET=probe_secret,
    )
    if token is not None:
        environment["ADE_TOKEN"] = token
    command = [
        sys.executable,
        "-m",
        "serving.page.app",
        *map(str, bundles),
        "--url",
        inference_url(ports, host),
        "--host",
        host,
        "--port",
        str(ports.ui),
    ]
    if allowed_hosts:
        command += ["--allowed-hosts", *allowed_hosts]
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
