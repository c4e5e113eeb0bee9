"""Ends what a Ray instance leaves behind when the process that started it is killed.

``python -m extensions.ray.serve.guard MARK FOLDER [ADDRESS]``, with a pipe from that process as its
standard input. On a cluster, Serve is shut down only if that process wrote that it deploys there:
otherwise what the cluster serves is somebody else's.

Ray's processes end with each other in most cases, and HAProxy with none. All inherit a mark in
their environment. Those that set a title, as workers and agents do, overwrite their environment as
others see it; they are found by their logs in the folder of the instance.
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

from extensions.ray.serve.environment import MARK

SERVES = b"serves\n"  # written by a process that is about to deploy on an unused cluster
DONE = b"done\n"  # written by a process that has stopped everything itself
# Of Ray's processes; a title may take the place of the environment, and with it of the mark.
TITLES = (b"ray::", b"ray-dashboard-")
ROUNDS = 50
PAUSE_S = 0.1


def start_guard(mark: str, folder: Path, address: str | None) -> subprocess.Popen[bytes]:
    """Start the guard of this process's instance; it ends after this process.

    Args:
        mark: of the instance.
        folder: removed in the end.
        address: of the cluster, if it is not our own.
    """
    return subprocess.Popen(
        [sys.executable, "-m", __name__, mark, str(folder), *([address] if address else [])],
        stdin=subprocess.PIPE,
        cwd="/",  # `ade serve` removes this process's, without which Ray does not start
        # Without the mark, or it would find itself. In a session of its own, or whoever kills this
        # process's group would kill it too.
        env={name: value for name, value in os.environ.items() if name != MARK},
        start_new_session=True,
        bufsize=0,
    )


def processes_of(mark: str, folder: Path) -> list[int]:
    """Processes of this user that belong to an instance, except for this one and its parent.

    Args:
        mark: of the instance, in the environment of its processes.
        folder: of the instance, which may be removed already.
    """
    wanted, own = f"{MARK}={mark}".encode(), {os.getpid(), os.getppid()}
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if int(process.name) not in own and (
                wanted in (process / "environ").read_bytes().split(b"\0")
                or (process / "cmdline").read_bytes().startswith(TITLES)
                and _has_open(process, folder)
            ):
                found.append(int(process.name))
    return found


def _has_open(process: Path, folder: Path) -> bool:
    """Whether a process has a file of a folder open."""
    for descriptor in (process / "fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            if os.readlink(descriptor).startswith(f"{folder}/"):
                return True
    return False


def end_all(mark: str, folder: Path) -> None:
    """Kill the processes of an instance, until there are none."""
    for _ in range(ROUNDS):
        found = processes_of(mark, folder)
        if not found:
            return
        for process in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(PAUSE_S)


def must_end_serving(written: bytes) -> bool:
    """Whether a process deployed on a cluster and did not stop that itself.

    Args:
        written: all that it wrote to its guard.
    """
    return SERVES in written and not written.endswith(DONE)


def _end_serving(address: str) -> None:
    import ray
    from ray import serve

    ray.init(address=address, logging_level="ERROR", log_to_driver=False)
    serve.shutdown()


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    own_mark, own_folder, *addresses = sys.argv[1:]
    own_input = sys.stdin.buffer.read()
    end_all(own_mark, Path(own_folder))
    shutil.rmtree(own_folder, ignore_errors=True)
    if addresses and must_end_serving(own_input):
        _end_serving(addresses[0])
