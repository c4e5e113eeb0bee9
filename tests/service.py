"""A real service for tests: ``ade serve`` in a process of its own, on ports of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil

from serving.ports import VARIABLES
from tests.conftest import ROOT


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()


class RunningService:
    """Started at once; ``output`` grows as it prints."""

    def __init__(self, *bundles: Path, options: tuple[str, ...] = (), timeout: float = 180,
                 python: str = sys.executable, folder: Path = ROOT) -> None:
        ports = dict(zip(VARIABLES, free_ports(len(VARIABLES)), strict=True))
        self.url = f"http://127.0.0.1:{ports['inference']}"
        self.page = f"http://127.0.0.1:{ports['ui']}"
        self.metrics = f"http://127.0.0.1:{ports['metrics']}"
        self.ports = ports
        environment = {**os.environ, **{VARIABLES[name][0]: str(port) for name, port in ports.items()}}
        started = time.monotonic()
        self.process = subprocess.Popen(
            [python, "-m", "ade_cli.main", "serve", *map(str, bundles), *options], cwd=folder, env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.output: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()
        while "Ctrl-C stops everything." not in "".join(self.output):
            if self.process.poll() is not None or time.monotonic() - started > timeout:
                self.process.kill()
                raise RuntimeError("the service did not start:\n" + "".join(self.output))
            time.sleep(0.1)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output.append(line)

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def stop(self, sign: signal.Signals = signal.SIGTERM) -> list[psutil.Process]:
        """Ask it to stop; returns the processes that are still there."""
        if self.process.poll() is not None:
            return []
        family = self.descendants()
        self.process.send_signal(sign)
        self.process.wait(60)
        _, alive = psutil.wait_procs(family, timeout=5)
        return alive
