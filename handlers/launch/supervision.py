"""Child processes of the service: started, watched, restarted, and gone with the service however
that ends.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

STOP_TIMEOUT_S = 20.0
MAX_OUTPUT_BYTES = 2**20  # of a child's standard output, and as much of what was before
MAX_DEATHS = 5
DEATHS_WITHIN_S = 60.0
# Reads process groups until the service is gone, by whatever signal; then it kills them and removes
# the working folder.
_REAPER = """
groups=
while read -r group; do groups="$groups $group"; done
for group in $groups; do kill -9 "-$group"; done 2>/dev/null
rm -rf -- "$1"
"""


class LaunchError(RuntimeError):
    """A service that did not come up, or cannot be kept up."""


@dataclass
class Child:
    """A process in a session of its own, and how it is started again."""

    name: str
    command: list[str]
    environment: dict[str, str]
    folder: Path
    restarts: bool
    process: subprocess.Popen[bytes] = field(init=False)
    deaths: deque[float] = field(default_factory=lambda: deque(maxlen=MAX_DEATHS))

    @property
    def output(self) -> Path:
        return self.folder / f"{self.name}.out"

    def start(self) -> None:
        with open(os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as out:
            self.process = subprocess.Popen(
                self.command,
                cwd=self.folder,
                env=self.environment,
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def tail(self, lines: int = 15) -> str:
        with contextlib.suppress(OSError):
            return "\n".join(self.output.read_text(errors="replace").splitlines()[-lines:])
        return ""

    def trim(self) -> None:
        """Keep the output small: it is appended to, so that the file can be emptied while it is
        written.
        """
        with contextlib.suppress(OSError):
            if self.output.stat().st_size > MAX_OUTPUT_BYTES:
                shutil.copy(self.output, self.output.with_suffix(".out.1"))
                os.truncate(self.output, 0)

    def stop(self) -> None:
        """Ask the process group to end, and make it end."""
        for sign, patience in ((signal.SIGTERM, STOP_TIMEOUT_S), (signal.SIGKILL, 5.0)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, sign)
            deadline = time.monotonic() + patience
            while time.monotonic() < deadline:
                self.process.poll()
                try:
                    os.killpg(self.process.pid, 0)
                except ProcessLookupError:
                    return
                time.sleep(0.05)


class Supervisor:
    """Keeps the children of a service.

    Args:
        folder: the service's working folder; removed with the children if the service is killed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._children: list[Child] = []
        self._start_reaper()

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for child in reversed(self._children):
            child.stop()
        self._stop_reaper()

    @property
    def pids(self) -> dict[str, int]:
        return {child.name: child.process.pid for child in self._children}

    def start(
        self, name: str, command: list[str], environment: dict[str, str], restarts: bool = False
    ) -> Child:
        """Start a command, its output in ``FOLDER/NAME.out``.

        Args:
            name: for messages.
            command: what to run, in the working folder.
            environment: all of it.
            restarts: whether the service lives on if it ends, because it is started again.
        """
        child = Child(name, command, environment, self._folder, restarts)
        child.start()
        self._children.append(child)
        self._announce(child)
        return child

    def tend(self, restarts: bool = True) -> bool:
        """Restart what may be restarted; whether anything was.

        Args:
            restarts: ``False`` while the service starts: what fails then is not repeated.

        Raises:
            LaunchError: a child ended that may not, or one did :data:`MAX_DEATHS` times within a
                minute.
        """
        restarted = False
        for child in self._children:
            child.trim()
            status = child.process.poll()
            if status is None:
                continue
            if not (restarts and child.restarts):
                raise LaunchError(f"{child.name} ended with {status}:\n{child.tail()}")
            now = time.monotonic()
            child.deaths.append(now)
            if len(child.deaths) == MAX_DEATHS and now - child.deaths[0] < DEATHS_WITHIN_S:
                raise LaunchError(
                    f"{child.name} ended {MAX_DEATHS} times within {DEATHS_WITHIN_S:.0f} s, at last with "
                    f"{status}:\n{child.tail()}"
                )
            print(f"{child.name} ended with {status}: restarting it", file=sys.stderr, flush=True)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.process.pid, signal.SIGKILL)  # what it may have left
            child.start()
            restarted = True
        if (
            restarted or self._reaper.poll() is not None
        ):  # it must not kill whoever is given a number that is free again
            self._stop_reaper()
            self._start_reaper()
        return restarted

    def tails(self) -> str:
        return "\n".join(f"{child.name}:\n{child.tail()}" for child in self._children)

    def _start_reaper(self) -> None:
        self._reaper = subprocess.Popen(
            ["/bin/sh", "-c", _REAPER, "ade-reaper", str(self._folder)],
            cwd="/",
            env={"PATH": os.defpath},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            bufsize=0,
        )
        for child in self._children:
            self._announce(child)

    def _stop_reaper(self) -> None:
        self._reaper.kill()
        self._reaper.wait()
        assert self._reaper.stdin is not None
        self._reaper.stdin.close()

    def _announce(self, child: Child) -> None:
        assert self._reaper.stdin is not None
        with contextlib.suppress(
            BrokenPipeError
        ):  # a killed reaper is replaced by tend(), which announces all again
            self._reaper.stdin.write(f"{child.process.pid}\n".encode())
