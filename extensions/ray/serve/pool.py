"""Workers as replicas of Ray Serve, which starts, checks and replaces them, and scales them.

A front on each node may use the same replicas: an application of Serve has the name of what it
computes, and who finds it there uses it.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from extensions.ray.instance import ADDRESS, ray_instance
from handlers.limits import RESPONSE_TIMEOUT_S, STARTUP_TIMEOUT_S
from handlers.service import pool, wire
from handlers.service.pool import PAUSE_S, PooledModel, WorkerError

if importlib.util.find_spec("ray") is None:  # it takes a second to import
    raise ModuleNotFoundError("--engine ray", name="ray")

logger = logging.getLogger(__name__)
LOGS = "~/.cache/ade/logs"  # of nodes; not in /tmp, where other users could prepare links
HEALTH_S = 5.0  # between two health checks
LOOK_S = 2.0  # between two looks at the replicas
LOOK_TIMEOUT_S = 10.0
STOP_S = 25.0  # for what a replica computes when it is asked to stop
UPSCALE_S, DOWNSCALE_S = 5.0, 60.0  # that a load must last for the number of replicas to change
# Of the private instance: two releases at a time, while one replaces the other.
RELEASES = 2
QUIET = {"enable_access_log": False, "log_level": "WARNING"}
_instance = contextlib.ExitStack()  # of this process


class Pool(pool.Pool):
    """Replicas of one release, an application of Serve for each model."""

    def __init__(self, models: Sequence[PooledModel], folder: Path) -> None:
        super().__init__(models, folder)
        self._address = os.environ.get(ADDRESS)
        self._apps = {self._name(model): model for model in models}
        self._seen: dict[str, set[str]] = {}  # names of replicas by that of their model
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """See :class:`handlers.service.pool.Pool`."""
        # In this thread: Ray's processes end with the thread that started them.
        connect(self._address, RELEASES * sum(model.num_workers for model in self.models))
        from ray import serve

        try:
            async with asyncio.timeout(STARTUP_TIMEOUT_S):
                await asyncio.to_thread(self._deploy)
        except (RuntimeError, TimeoutError) as error:
            raise WorkerError(f"the replicas did not start: {error}") from None
        for name, model in self._apps.items():
            handle = serve.get_app_handle(name)
            await self._look(model, handle)
            self._tasks.append(asyncio.create_task(self._keep_looking(model, handle)))
            # At most as many batches at a time as there can be replicas: their number follows.
            self._tasks += [
                asyncio.create_task(self._keep_asking(model, handle))
                for _ in range(model.num_workers)
            ]

    async def stop(self) -> None:
        """See :class:`handlers.service.pool.Pool`. On a cluster, other fronts keep the replicas."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for model in self.models:
            self._note(model, [])
        if self._address is None:
            await asyncio.to_thread(self._delete)

    def _name(self, model: PooledModel) -> str:
        """On a cluster, all fronts that serve the same have one application."""
        if self._address is None:
            return f"{self.folder.name}-{model.name}"
        what = dataclasses.replace(model.settings[0], name="", logs="")
        return f"ade-{hashlib.sha256(repr(what).encode()).hexdigest()[:16]}-{model.name}"

    def _deploy(self) -> None:
        from ray import serve

        serve.start(proxy_location="Disabled")
        there = serve.status().applications
        targets = [
            serve.RunTarget(self._deployment(model), name, None, QUIET)
            for name, model in self._apps.items()
            if name not in there or there[name].status != "RUNNING"
        ]
        if targets:
            serve.run_many(targets, wait_for_applications_running=True)

    def _deployment(self, model: PooledModel) -> Any:
        from ray import serve

        from extensions.ray.serve.replica import Replica

        settings = model.settings[0]
        if self._address is not None and Path(settings.logs).is_relative_to(self.folder.parent):
            settings = dataclasses.replace(settings, logs=LOGS)  # other nodes have no such folder
        on_gpu = settings.options.device == "cuda"
        all_workers = sum(one.num_workers for one in self.models)
        return (
            serve.deployment(Replica)
            .options(
                name=model.name,
                max_ongoing_requests=2,  # calls, each of a batch: the next is there in time
                autoscaling_config={
                    "min_replicas": 1,
                    "max_replicas": model.num_workers,
                    "target_ongoing_requests": 1,
                    "upscale_delay_s": UPSCALE_S,
                    "downscale_delay_s": DOWNSCALE_S,
                },
                ray_actor_options={
                    "num_cpus": 1,
                    "num_gpus": int(1e4 / RELEASES / all_workers) / 1e4 if on_gpu else 0,
                },
                health_check_period_s=HEALTH_S,
                graceful_shutdown_timeout_s=STOP_S,
                graceful_shutdown_wait_loop_s=0.5,
            )
            .bind(settings)
        )

    def _delete(self) -> None:
        from ray import serve

        for name in self._apps:
            with contextlib.suppress(Exception):  # Ray's, if it was not deployed or Ray is gone
                serve.delete(name, _blocking=False)

    async def _keep_looking(self, model: PooledModel, handle: Any) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            await self._look(model, handle)

    async def _look(self, model: PooledModel, handle: Any) -> None:
        """Find out which replicas there are."""
        try:
            found = await handle.broadcast("describe").results_async(timeout_s=LOOK_TIMEOUT_S)
        except Exception as error:  # Ray's, such as of a replica that ended just now
            logger.warning("%s is not ready: %r", model.name, error)
            found = []
        self._note(model, found)

    def _note(self, model: PooledModel, found: list[dict[str, Any]]) -> None:
        names = {one["worker"] for one in found}
        for gone in self._seen.get(model.name, set()) - names:
            model.drop_gauges(gone)
        self._seen[model.name] = names
        model.workers[:] = map(_Worker, found)

    async def _keep_asking(self, model: PooledModel, handle: Any) -> None:
        """Have batches computed, one at a time; Serve gives each to a free replica."""
        never = asyncio.get_running_loop().create_future()
        ask = functools.partial(self._ask, model, handle)
        while True:
            batch = await model.next_batch(never)
            try:
                await model.compute(batch, ask)
            except WorkerError as error:
                logger.error("%s: no answer: %s", model.name, error)
                await asyncio.sleep(PAUSE_S)

    async def _ask(self, model: PooledModel, handle: Any, parts: list[wire.Body]) -> wire.Message:
        """Have a batch computed.

        Raises:
            WorkerError: there was no answer in time.
            Exception: Ray's, such as of a replica that ended.
        """
        response = handle.remote(b"".join(parts))
        try:
            async with asyncio.timeout(RESPONSE_TIMEOUT_S):
                worker, measured, message = await response
        except BaseException as error:
            response.cancel()
            if isinstance(error, TimeoutError):
                raise WorkerError(f"no answer within {RESPONSE_TIMEOUT_S} s") from None
            raise
        model.measure(worker, {"measurements": measured})
        return wire.unpack(message)


class _Worker:
    """A replica that can compute."""

    is_ready = True

    def __init__(self, found: dict[str, Any]) -> None:
        self._found = found

    def describe(self) -> dict[str, Any]:
        return {"pid": self._found["pid"], "host": self._found["host"], "state": "READY"}


def connect(address: str | None, num_workers: int) -> None:
    """Connect this process to Ray until it ends, unless it is.

    Raises:
        ClusterError: Ray does not start, or there is no cluster at the address.
    """
    if "ray" not in sys.modules or not sys.modules["ray"].is_initialized():
        _instance.enter_context(ray_instance(address, num_workers))
        atexit.register(_instance.close)
