"""Starts a model server and the page as child processes, waits until all answers, and stops what it started."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

from serving.ports import Ports, local_address
from serving.status import management_key, queued_requests

START_TIMEOUT_S = 240.0
STOP_TIMEOUT_S = 20.0
DRAIN_TIMEOUT_S = 30.0


class LaunchError(RuntimeError):
    """A service that did not come up."""


@dataclass(frozen=True)
class Child:
    """A process group that we started."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def tail(self, lines: int = 15) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


def start_child(name: str, command: list[str], environment: dict[str, str], folder: Path) -> Child:
    """Start a command in a session of its own, its output in ``FOLDER/NAME.out``."""
    log = folder / f"{name}.out"
    with open(log, "wb") as out:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=subprocess.STDOUT,
                                   stdin=subprocess.DEVNULL, start_new_session=True)
    return Child(name, process, log)


def stop_child(child: Child) -> None:
    """Ask a process group to end, and make it end."""
    for sign, patience in ((signal.SIGTERM, STOP_TIMEOUT_S), (signal.SIGKILL, 5.0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.process.pid, sign)
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            child.process.poll()
            try:
                os.killpg(child.process.pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.05)


def drain(folder: Path, workers: int, ports: Ports, server: Child) -> None:
    """Let workers finish what was accepted: wait until nothing queues, have them refuse the rest, wait until all are done.

    Args:
        folder: what workers look at, and leave their signs in; made here.
        workers: how many there are.
        ports: where the service listens.
        server: if it is gone, nothing is left to wait for.
    """
    deadline = time.monotonic() + DRAIN_TIMEOUT_S
    key = management_key(folder.parent)
    while (server.process.poll() is None and time.monotonic() < deadline - DRAIN_TIMEOUT_S / 2
           and queued_requests(ports, key)):
        time.sleep(0.1)
    folder.mkdir()
    while server.process.poll() is None and time.monotonic() < deadline and len(list(folder.iterdir())) < workers:
        time.sleep(0.1)


@contextlib.contextmanager
def working_folder() -> Iterator[Path]:
    """A folder of its own for everything that a service writes; gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="ade-serve-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def start_page(ports: Ports, host: str, folder: Path, token: str | None, bundles: list[Path]) -> Child:
    """Start the web page; it talks to the service over HTTP, on loopback."""
    environment = {**os.environ, "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1",
                   "OMP_NUM_THREADS": "1", "GRADIO_TEMP_DIR": str(folder / "page-files")}
    Path(environment["GRADIO_TEMP_DIR"]).mkdir()
    if token is not None:
        environment["ADE_TOKEN"] = token
    command = [sys.executable, "-m", "serving.page.app", *map(str, bundles), "--url", inference_url(ports, host),
               "--host", host, "--port", str(ports.ui)]
    return start_child("page", command, environment, folder)


def inference_url(ports: Ports, host: str) -> str:
    """Where this machine reaches the service."""
    return f"http://{local_address(host)}:{ports.inference}"


def wait_until(ready: Callable[[], bool], children: list[Child]) -> None:
    """Wait for a condition while the children live.

    Raises:
        LaunchError: a child ended, or it took too long; with the end of the child's output.
    """
    deadline = time.monotonic() + START_TIMEOUT_S
    while not ready():
        for child in children:
            if child.process.poll() is not None:
                raise LaunchError(f"{child.name} ended with {child.process.returncode}:\n{child.tail()}")
        if time.monotonic() > deadline:
            ends = "\n".join(f"{child.name}:\n{child.tail()}" for child in children)
            raise LaunchError(f"not ready after {START_TIMEOUT_S:.0f} s\n{ends}")
        time.sleep(0.2)


def page_is_ready(ports: Ports, host: str) -> bool:
    """Whether the page's ``/readyz`` says that all operations answer."""
    try:
        return httpx.get(f"http://{local_address(host)}:{ports.ui}/readyz", timeout=30).status_code == 200
    except httpx.TransportError:
        return False
