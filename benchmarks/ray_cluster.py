"""A Ray cluster of several nodes on this machine."""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from ade_base.ports import free_ports
from extensions.ray.instance import OF_EVERY_NODE

START_S = 60.0  # that a node may take to start


class Cluster:
    """A head and workers on this machine, as on several ones.

    Args:
        folder: short, for its files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []
        self.environment = {
            **os.environ,
            **OF_EVERY_NODE,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
        }
        (self.port,) = free_ports(1)
        self.address = f"127.0.0.1:{self.port}"
        self.head = self._start(
            "--head",
            f"--port={self.port}",
            "--num-cpus=1",
            "--include-dashboard=False",
        )

    def add_worker(self, cpus: int) -> subprocess.Popen[bytes]:
        return self._start(f"--address={self.address}", f"--num-cpus={cpus}")

    def kill(self, node: subprocess.Popen[bytes]) -> None:
        """End a node and everything that runs on it, as if its machine were gone."""
        for process in psutil.Process(node.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        node.kill()

    def _start(self, *options: str) -> subprocess.Popen[bytes]:
        listen, grpc, environments, export, client = free_ports(5)
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *options]
        command += [
            f"--dashboard-agent-listen-port={listen}",
            f"--dashboard-agent-grpc-port={grpc}",
            f"--runtime-env-agent-port={environments}",
            f"--metrics-export-port={export}",
            "--min-worker-port=0",
            "--max-worker-port=0",
            "--node-ip-address=127.0.0.1",
            f"--object-store-memory={100 * 2**20}",
        ]
        if "--head" in options:
            command += [f"--ray-client-server-port={client}", f"--temp-dir={self.folder}"]
        log = self.folder / f"node-{len(self._processes)}.txt"
        with open(log, "wb") as out:
            process = subprocess.Popen(
                command, env=self.environment, stdout=out, stderr=out, start_new_session=True
            )
        self._processes.append(process)
        # One after another: nodes that start at the same time may hang.
        deadline = time.monotonic() + START_S
        while "Ray runtime started" not in log.read_text():
            if process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"a node did not start:\n{log.read_text()}")
            time.sleep(0.1)
        return process

    def stop(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                self.kill(process)
            process.wait(10)


@contextlib.contextmanager
def ray_cluster() -> Iterator[Cluster]:
    """A cluster for the length of the block."""
    with tempfile.TemporaryDirectory(
        prefix="ade-", dir="/tmp", ignore_cleanup_errors=True
    ) as short:
        made = Cluster(Path(short))
        try:
            yield made
        finally:
            made.stop()
