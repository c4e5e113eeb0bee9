"""Runs ``ade serve`` in a process on free ports, or in this process until it is refused."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from ade_base.ports import VARIABLES, Ports, free_ports
from ade_cli.main import main
from handlers.launch.publish import DESCRIBE
from handlers.processes.channel import ask
from handlers.processes.run_folder import find_service
from handlers.torchserve.configuration import ServerFolder
from tests.helpers import PRETRAINED, ROOT

# In the environment of ``ade serve``; its child processes must not have them.
CANARIES = {"OPENAI_API_KEY": "canary-of-openai", "AWS_SECRET_ACCESS_KEY": "canary-of-aws"}

# Of each engine, as in their commands.
WORKERS = ("model_service_worker", "handlers.service.worker")


class RunningService:
    """A service that is started by the constructor; ``output`` collects what it prints."""

    def __init__(
        self, *bundles, options=(), timeout=180, python=sys.executable, folder=ROOT, variables=None
    ):
        ports = dict(zip(VARIABLES, free_ports(len(VARIABLES)), strict=True))
        self.url = f"http://127.0.0.1:{ports['inference']}"
        self.page = f"http://127.0.0.1:{ports['ui']}"
        self.metrics = f"http://127.0.0.1:{ports['metrics']}"
        self.ports = ports
        self.options = options
        self.variables = {VARIABLES[name][0]: str(port) for name, port in ports.items()}
        environment = {**os.environ, **CANARIES, **self.variables, **(variables or {})}
        started = time.monotonic()
        self.process = subprocess.Popen(
            [python, "-m", "ade_cli.main", "serve", *map(str, bundles), *options],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.output: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()
        while "Ctrl-C stops everything." not in "".join(self.output):
            if self.process.poll() is not None or time.monotonic() - started > timeout:
                self.process.kill()
                raise RuntimeError("the service did not start:\n" + "".join(self.output))
            time.sleep(0.1)

    def _read(self):
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                self.output.append(line)

    @property
    def folder(self):
        """The working folder, found as ``ade status`` finds it."""
        folder = find_service(Ports(**self.ports))
        assert folder is not None
        return folder

    @property
    def torchserve(self):
        """The working folder of the TorchServe of its first release."""
        return ServerFolder(self.folder.of_release(1))

    @property
    def pids(self):
        """Process ids of its parts, as its folder records them, without TorchServe's workers."""
        found = self.folder.read_description()
        assert found is not None
        return found["pids"]

    def worker_pids(self):
        """Process ids of the workers that are ready, by model."""
        described = ask(self.folder.control_socket, {"do": DESCRIBE})["workers"] or {}
        return {
            name: [one["pid"] for one in model["workers"] if one["state"] == "READY"]
            for name, model in described.items()
        }

    def descendants(self):
        """All its processes, without those that have ended and are not reaped yet."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def workers(self):
        """The worker processes, without decoders, which are temporary."""
        return [
            process
            for process in self.descendants()
            if any(name in " ".join(process.cmdline()) for name in WORKERS)
        ]

    def stop(self, sign=signal.SIGTERM):
        """Stop the service; returns the processes that are left."""
        if self.process.poll() is not None:
            return []
        family = self.descendants()
        self.process.send_signal(sign)
        self.process.wait(60)
        _, alive = psutil.wait_procs(family, timeout=5)
        return alive


def error_of_serve(*options, **variables):
    """The error of ``ade serve`` with these options and environment variables.

    It must occur before anything is started.
    """
    printed, before = io.StringIO(), signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(printed):
        patch.setattr("handlers.launch.serve.run_folder", lambda: pytest.fail("it was accepted"))
        for name, value in variables.items():
            patch.setenv(name, value)
        try:
            status = main(["serve", str(PRETRAINED), *options])
        finally:
            signal.signal(signal.SIGTERM, before)
    assert status == 2
    return printed.getvalue()
