"""Starts TorchServe and its front, and drains them before a stop."""

from __future__ import annotations

import contextlib
import sys
import time

from handlers.launch.engines import Plan
from handlers.launch.page_process import wait_until
from handlers.launch.status import queued_requests
from handlers.processes.environment import child_environment
from handlers.processes.run_folder import RunFolder
from handlers.processes.supervision import Child, Supervisor
from handlers.processes.watchdog import end_if_it_hangs
from handlers.torchserve.archives import write_archives
from handlers.torchserve.configuration import write_configuration
from handlers.torchserve.front import ServerSettings

DRAIN_TIMEOUT_S = 30.0
EMPTY_TIMES = 5  # that the queues are found empty before workers reject requests


class TorchServe:
    """An :class:`handlers.launch.engines.Engine`."""

    def __init__(self, plan: Plan, folder: RunFolder, supervisor: Supervisor) -> None:
        self._plan = plan
        self._folder = folder
        self._supervisor = supervisor
        self._models: dict[str, int] = {}
        self._identities: dict[str, str] = {}
        self._unused_stop_folder = folder.stop_folder.with_suffix(".unused")
        self._server: Child

    def start(self) -> None:
        """Start TorchServe with its workers."""
        plan, folder = self._plan, self._folder
        folder.store.mkdir()
        self._unused_stop_folder.mkdir()  # now, because the disk may be full at the end
        for i, bundle in enumerate(plan.bundles):
            written = write_archives(
                bundle,
                folder.store,
                plan.options,
                plan.workers,
                bundle.name if i else None,
            )
            self._models |= written
            self._identities |= dict.fromkeys(written, bundle.model_id)
        self._server = self._supervisor.start(
            "torchserve", *write_configuration(folder, list(self._models), plan.options, plan.logs)
        )

    def open(self) -> None:
        """Start the front, the only process of the API that listens on TCP, once the keys exist."""
        plan, folder = self._plan, self._folder
        wait_until(lambda: folder.server_key("inference") is not None, self._supervisor)
        settings = folder.path / "front.json"
        ServerSettings(
            **plan.front,
            inference_socket=str(folder.inference_socket),
            metrics_socket=str(folder.metrics_socket),
            server_key=folder.server_key("inference") or "",
            models=self._models,
            identities=self._identities,
        ).save(settings)
        command = [sys.executable, "-m", "handlers.torchserve.front", str(settings)]
        front = self._supervisor.start(
            "front", command, child_environment(), restarts=True, output=plan.logs / "front.out"
        )
        end_if_it_hangs(front, plan.ports.metrics, self._supervisor)

    def drain(self) -> None:
        """Let the workers finish the accepted requests.

        Waits until the queues are empty, then makes workers reject further requests, and waits
        until all of them are idle, or for :data:`DRAIN_TIMEOUT_S` if that cannot be known. If
        TorchServe has ended, this returns at once.
        """
        deadline = time.monotonic() + DRAIN_TIMEOUT_S
        empty = 0  # times in a row; requests that wait in the front come when others are answered
        while (
            self._is_running()
            and time.monotonic() < deadline - DRAIN_TIMEOUT_S / 2
            and empty < EMPTY_TIMES
        ):
            time.sleep(0.1)
            empty = empty + 1 if queued_requests(self._folder) == 0 else 0
        with contextlib.suppress(OSError):
            self._unused_stop_folder.rename(self._folder.stop_folder)
        while (
            self._is_running()
            and time.monotonic() < deadline
            # Without the folder, glob() finds nothing.
            and len(list(self._folder.stop_folder.glob("*"))) < self._plan.num_workers
        ):
            time.sleep(0.1)

    def is_whole(self) -> bool:
        """Whether archives, unpacked models and sockets still exist."""
        folder = self._folder
        needed = (
            folder.store,
            folder.temporary / "models",
            folder.inference_socket,
            folder.management_socket,
        )
        return all(file.exists() for file in needed)

    def _is_running(self) -> bool:
        return self._server.process.poll() is None
