"""Starts, watches and restarts the child processes of the service.

The children end with the service, even if it is killed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from ade_base.errors import UserError
from ade_base.system import signals_held

STOP_TIMEOUT_S = 20.0
KILL_TIMEOUT_S = 5.0
MAX_OUTPUT_BYTES = 2**20  # of the file with a child's output; one older file is kept
TAIL_LINES = 15  # of that output, in errors
MAX_DEATHS = 5
DEATHS_WITHIN_S = 60.0
# Reads the ids of process groups until the service ends, which closes its standard input. Then it
# kills those groups and removes the working folder.
_REAPER = """
groups=
while read -r group; do groups="$groups $group"; done
for group in $groups; do kill -9 "-$group"; done 2>/dev/null
rm -rf -- "$1"
"""


class LaunchError(UserError, RuntimeError):
    """The service did not start, or cannot be kept running."""


def tell(text: str, on_output: bool = False) -> None:
    """Print on standard error or output if possible: its disk may be full, or its reader gone."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stdout if on_output else sys.stderr, flush=True)


@dataclass
class Child:
    """A child process in its own session, with everything needed to restart it.

    Attributes:
        output: the file of its output, which is appended to.
        pass_fds: file descriptors that it inherits.
        is_ending: whether it was asked to end for good, and is not restarted.
        is_swept: whether what was left of it was killed after its end.
    """

    name: str
    command: list[str]
    environment: dict[str, str]
    folder: Path
    output: Path
    restarts: bool
    pass_fds: tuple[int, ...] = ()
    is_ending: bool = field(default=False, init=False)
    is_swept: bool = field(default=False, init=False)
    process: subprocess.Popen[bytes] = field(init=False)
    deaths: deque[float] = field(default_factory=lambda: deque(maxlen=MAX_DEATHS))

    def start(self) -> None:
        with open(self._open_output(), "ab") as out:
            self.process = subprocess.Popen(
                self.command,
                cwd=self.folder,
                env=self.environment,
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                pass_fds=self.pass_fds,
            )
        self.is_swept = False

    def _open_output(self) -> int:
        # Logs that were removed or cannot be written must not keep the child from starting again.
        try:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            return os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        except OSError as error:
            if not self.is_swept:  # it has not run before
                raise
            tell(f"the output of {self.name} is dropped until it is restarted: {error}")
            return os.open(os.devnull, os.O_WRONLY)

    def tail(self) -> str:
        """The last lines of its output; empty if it cannot be read."""
        with contextlib.suppress(OSError):
            return "\n".join(self.output.read_text(errors="replace").splitlines()[-TAIL_LINES:])
        return ""

    def trim(self) -> None:
        """Keep the output file small.

        It can be emptied while the child writes, because the child appends to it.
        """
        with contextlib.suppress(OSError):
            if self.output.stat().st_size > MAX_OUTPUT_BYTES:
                shutil.copy(self.output, self.output.with_suffix(".out.1"))
                os.truncate(self.output, 0)

    def sweep(self) -> None:
        """Kill what is left of its group once it has ended; later the number may be another's."""
        if not self.is_swept:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.is_swept = True

    def stop(self) -> None:
        """Terminate the process group, and kill it if it does not end in time."""
        if self.is_swept:
            return
        for sign, patience in (
            (signal.SIGTERM, STOP_TIMEOUT_S),
            (signal.SIGKILL, KILL_TIMEOUT_S),
        ):
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
    """Manages the child processes of a service. Several threads may use it.

    Args:
        folder: the working folder of the service. If the service is killed, the folder is removed
            and the children are killed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._children: list[Child] = []
        self._lock = threading.RLock()
        self._is_closed = False
        self._is_stale = False  # whether the reaper knows processes that have ended
        self._start_reaper()

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._is_closed = True
        children = reversed(list(self._children))
        with ThreadPoolExecutor() as pool:  # together they take as long as the slowest
            list(pool.map(Child.stop, children))
        _kill(self._reaper)

    @property
    def is_closed(self) -> bool:
        """Whether the service is being stopped."""
        return self._is_closed

    @property
    def pids(self) -> dict[str, int]:
        return {child.name: child.process.pid for child in self._children if not child.is_ending}

    def start(
        self,
        name: str,
        command: list[str],
        environment: dict[str, str],
        restarts: bool = False,
        pass_fds: tuple[int, ...] = (),
        output: Path | None = None,
    ) -> Child:
        """Start a command.

        Args:
            name: used in messages.
            command: run in the working folder.
            environment: the complete environment.
            restarts: whether the child is restarted when it ends. Otherwise the service ends too.
            pass_fds: see :class:`Child`.
            output: file of its output; ``NAME.out`` in the working folder by default.

        Raises:
            LaunchError: the service is being stopped.
        """
        output = output or self._folder / f"{name}.out"
        child = Child(
            name,
            command,
            environment,
            self._folder,
            output,
            restarts,
            pass_fds,
        )
        with self._lock, signals_held():
            if self._is_closed:
                raise LaunchError("the service is being stopped")
            child.start()
            self._children.append(child)
            self._announce(child)
        return child

    def stop(self, child: Child) -> None:
        """Stop a child for good."""
        with self._lock:
            child.is_ending = True
        child.stop()
        with self._lock:
            self._children.remove(child)
            self._renew_reaper()

    def tend(self, restarts: bool = True) -> bool:
        """Restart children that ended; returns whether any was restarted.

        Args:
            restarts: ``False`` while the service starts, when every end of a child is an error.

        Raises:
            LaunchError: a child ended that is not restarted, or one ended :data:`MAX_DEATHS` times
                within :data:`DEATHS_WITHIN_S`.
        """
        with self._lock:
            return self._tend(restarts)

    def _tend(self, restarts: bool) -> bool:
        restarted = False
        for child in self._children:
            child.trim()
            status = child.process.poll()
            if status is not None and child.is_ending:
                child.sweep()
            if status is None or child.is_ending:
                continue
            if not (restarts and child.restarts):
                raise LaunchError(f"{child.name} ended with {status}:\n{child.tail()}")
            now = time.monotonic()
            child.deaths.append(now)
            is_full = len(child.deaths) == MAX_DEATHS
            if is_full and now - child.deaths[0] < DEATHS_WITHIN_S:
                raise LaunchError(
                    f"{child.name} ended {MAX_DEATHS} times within {DEATHS_WITHIN_S:.0f} s, "
                    f"at last with {status}:\n{child.tail()}"
                )
            tell(f"{child.name} ended with {status}: restarting it")
            child.sweep()
            try:
                with signals_held():
                    child.start()
                    self._announce(child)
            except OSError as error:  # such as for want of memory or of processes
                tell(f"{child.name} cannot be started, trying again: {error}")
                child.deaths.pop()
                continue
            restarted = True
        if restarted or self._is_stale or self._reaper.poll() is not None:
            self._renew_reaper()
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

    def _renew_reaper(self) -> None:
        """Start a new one, which forgets old process ids: others may have them now."""
        if self._is_closed:
            return
        former = self._reaper
        with signals_held():  # or the new one could end, and remove the folder
            try:
                self._start_reaper()
                self._is_stale = False
            except OSError as error:  # the former one stays until tend() succeeds
                tell(f"the reaper cannot be started, trying again: {error}")
                self._is_stale = True
                return
            _kill(former)

    def _announce(self, child: Child) -> None:
        assert self._reaper.stdin is not None
        # If the reaper was killed, tend() starts another and announces all children again.
        with contextlib.suppress(BrokenPipeError, ValueError):  # killed, or stopped and closed
            self._reaper.stdin.write(f"{child.process.pid}\n".encode())


def _kill(reaper: subprocess.Popen[bytes]) -> None:
    reaper.kill()
    reaper.wait()
    assert reaper.stdin is not None
    reaper.stdin.close()
