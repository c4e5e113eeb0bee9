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
from extensions.ray.serve.environment import MARK, of_every_node, of_haproxy
from extensions.ray.serve.guard import end_all

START_S = 60.0  # that a node may take to start


class Cluster:
    """A head and workers on this machine, as on several ones.

    Args:
        folder: short, for its files.
        is_alone: whether the head has no workers. Then it is as on a machine of its own: with
            HAProxy, a dashboard, and an address besides 127.0.0.1.
    """

    def __init__(self, folder: Path, is_alone: bool) -> None:
        self.folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []
        self.mark = secrets.token_hex(16)
        self.environment = {
            **os.environ,
            **of_every_node(),
            MARK: self.mark,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
        }
        if is_alone:
            self.environment |= of_haproxy(folder)
        else:
            # Nodes of one machine have one address: one proxy, on the head, serves them all.
            self.environment.pop("RAY_SERVE_ENABLE_HA_PROXY", None)
        self.port, dashboard = free_ports(2)
        self.host = "127.0.0.2" if is_alone else "127.0.0.1"
        self.address = f"{self.host}:{self.port}"
        self.dashboard = f"http://127.0.0.1:{dashboard}"
        self.head = self._start(
            "--head",
            f"--port={self.port}",
            f"--num-cpus={8 if is_alone else 1}",
            f"--include-dashboard={is_alone}",
            f"--dashboard-port={dashboard}",
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
            f"--node-ip-address={self.host}",
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
        end_all(self.mark, self.folder)
        for process in self._processes:
            process.wait(10)


@contextlib.contextmanager
def ray_cluster(is_alone: bool = False) -> Iterator[Cluster]:
    """A cluster for the length of the block; ``is_alone`` as for :class:`Cluster`."""
    with tempfile.TemporaryDirectory(
        prefix="ade-", dir="/tmp", ignore_cleanup_errors=True
    ) as short:
        made = Cluster(Path(short), is_alone)
        try:
            yield made
        finally:
            made.stop()
