"""Ends what a Ray instance leaves behind when the process that started it is killed.

``python -m handlers.ray_serve.guard MARK FOLDER [ADDRESS]``, with a pipe from that process as its
standard input.

Ray's processes end with each other in most cases, and HAProxy with none. All inherit a mark in
their environment, by which they are found here.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from handlers.ray_serve.environment import MARK

DONE = b"done\n"  # written by a process that has stopped everything itself
ROUNDS = 50
PAUSE_S = 0.1


def start_guard(mark: str, folder: Path, address: str | None) -> subprocess.Popen[bytes]:
    """Start the guard of this process's instance; it ends after this process.

    Args:
        mark: of the instance.
        folder: removed in the end.
        address: of the cluster that serves, if it is not our own: there Serve is shut down.
    """
    return subprocess.Popen(
        [sys.executable, "-m", __name__, mark, str(folder), *([address] if address else [])],
        stdin=subprocess.PIPE,
        # Without the mark, or it would find itself. In a session of its own, or whoever kills this
        # process's group would kill it too.
        env={name: value for name, value in os.environ.items() if name != MARK},
        start_new_session=True,
        bufsize=0,
    )


def processes_of(mark: str) -> list[int]:
    """Processes of this user with the mark in their environment, except for this one."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int(folder.name) != os.getpid() and wanted in (
                folder / "environ"
            ).read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def end_all(mark: str) -> None:
    """Kill the processes of an instance, until there are none."""
    for _ in range(ROUNDS):
        found = processes_of(mark)
        if not found:
            return
        for process in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(PAUSE_S)


def _end_serving(address: str) -> None:
    import ray
    from ray import serve

    ray.init(address=address, logging_level="ERROR", log_to_driver=False)
    serve.shutdown()


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    own_mark, own_folder, *addresses = sys.argv[1:]
    is_done = sys.stdin.buffer.read().endswith(DONE)
    end_all(own_mark)
    shutil.rmtree(own_folder, ignore_errors=True)
    if addresses and not is_done:
        _end_serving(addresses[0])
