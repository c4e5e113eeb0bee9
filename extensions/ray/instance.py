"""A connection to Ray: to a cluster, or to a private instance on this machine.

Ray reads its variables when it is imported, so they are set before.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import logging
import os
import secrets
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ade_base.errors import UserError
from ade_base.system import available_cores
from handlers.processes.run_folder import kept_from_cleaners
from handlers.service.pool import VARIABLES

ADDRESS = "RAY_ADDRESS"  # Ray's own variable: of a cluster
OBJECTS_BYTES = 256 * 2**20  # of shared memory, for bodies and answers on their way
LOCAL = "127.0.0.1"
# CPUs beside those of the workers: one for tasks that read or write, and, if scoring in bulk is
# resumed, one for the actor that leaves out committed rows. Without either, Ray Data waits forever.
BESIDE = 2
START_S = 120.0  # after which it is not tried again
SHORT, PREFIX = "/tmp", "ade-ray-"  # Unix sockets have short paths, and Ray's folders long names
OF_EVERY_NODE = {
    **VARIABLES,
    "RAY_USAGE_STATS_ENABLED": "0",
    # Each replica starts a gRPC server, which listens on all addresses and unpickles what it gets:
    # it asks for Ray's token, and takes no message.
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "0",
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": "0",
    # The front calls replicas in its own event loop, and they answer in theirs.
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    # With Ray's default of 3 s, detecting a lost node, by five failures in a row, takes most of
    # the outage. A node that hangs still has five timeouts of 10 s.
    "RAY_health_check_period_ms": "1000",
}


class ClusterError(UserError, RuntimeError):
    """Ray cannot be started here, or the cluster cannot be used."""


@contextlib.contextmanager
def ray_instance(address: str | None, num_workers: int) -> Iterator[Any]:
    """Connect to Ray; yields its module. What was started ends with the block or this process.

    SIGTERM ends the block with the caller's handler, or without one with :class:`SystemExit`, 0.

    Args:
        address: of a cluster; a private instance if there is none.
        num_workers: actors of one CPU each that must find a place on this machine.

    Raises:
        ClusterError: Ray does not start, or there is no cluster at the address.
    """
    _remove_abandoned()
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=SHORT))
    before = signal.getsignal(signal.SIGTERM)
    on_sigterm = before if callable(before) else _stop
    signal.signal(signal.SIGTERM, on_sigterm)
    os.environ.update(OF_EVERY_NODE)
    try:
        with kept_from_cleaners(folder):
            if address is None:
                os.environ.update(_of_own_instance(folder))
            import ray  # reads the environment

            try:
                if address is None:
                    _start(ray, folder, num_workers)
                else:
                    _join(ray, address)
            except SystemExit:  # also by Ray's own handler, with the signal's number
                on_sigterm(signal.SIGTERM, None)
                raise
            signal.signal(signal.SIGTERM, on_sigterm)  # Ray has set its own
            try:
                yield ray
            finally:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                ray.shutdown()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        signal.signal(signal.SIGTERM, before)


def _stop(number: int, frame: object) -> None:
    raise SystemExit(0)


def _remove_abandoned() -> None:
    """Remove what processes that were killed left behind; Ray's own processes end with them."""
    for path in Path(SHORT).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            if path.is_symlink() or path.stat().st_uid != os.getuid():
                continue
            held = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if time.time() - path.stat().st_mtime > START_S:  # otherwise it may be a new one
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(held)


def _of_own_instance(folder: Path) -> dict[str, str]:
    """The variables of a private instance, with the token that its processes show each other."""
    token_file = folder / "token"
    with open(os.open(token_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        # Its name notwithstanding: no process of Ray is reached from another machine.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_TMPDIR": str(folder),
        # Do not lower the workers' scheduling priority; the other engines do not either.
        "RAY_worker_niceness": "0",
    }


def _start(ray: Any, folder: Path, num_workers: int) -> None:
    """Start an instance on ports that it chooses itself."""
    deadline = time.monotonic() + START_S
    for attempt in itertools.count():
        try:
            ray.init(
                address="local",
                # Each worker finds a place, and so does what Ray Data runs beside them: they share
                # the cores as processes do.
                num_cpus=max(available_cores(), num_workers) + BESIDE,
                object_store_memory=OBJECTS_BYTES,
                include_dashboard=False,
                logging_level=logging.ERROR,
                log_to_driver=False,
                _temp_dir=str(folder / f"r{attempt}"),
            )
            break
        except Exception as error:  # Ray has no other: "The current node timed out during startup"
            # Ray gives up if its own agents do not answer within 15 s, as on a busy machine.
            ray.shutdown()
            if time.monotonic() > deadline:
                raise ClusterError(f"Ray did not start: {error}") from None
    address = ray.util.get_node_ip_address()
    if address != LOCAL:  # how Ray is kept there is not documented
        raise ClusterError(f"Ray listens on {address} instead of {LOCAL} alone")


def _join(ray: Any, address: str) -> None:
    try:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        # With a wrong token, the cause alone says so.
        why = "" if error.__cause__ is None else f" ({error.__cause__})"
        raise ClusterError(f"the Ray cluster at {address}: {error}{why}") from None


if __name__ == "__main__":
    for variable, value in OF_EVERY_NODE.items():
        print(f"export {variable}={value}")
