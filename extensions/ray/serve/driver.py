"""The process that serves on Ray: ``python -m extensions.ray.serve.driver SETTINGS``.

It starts a Ray instance on this machine, or joins a cluster, and stops all that it started.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import socket
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ade_base.ports import LOOPBACK
from extensions.ray.serve.environment import has_haproxy
from extensions.ray.serve.instance import LOCAL, ClusterError, ray_instance
from extensions.ray.serve.settings import LOGS, Access, ServeSettings
from handlers.front import listen
from handlers.front.admission import Limits
from handlers.front.exposition import metrics_answer, only_metrics
from handlers.front.front import Answer, Endpoint, Request
from handlers.front.settings import FrontSettings

logger = logging.getLogger(__name__)
APP = "ade"
CONTROLLER = "SERVE_CONTROLLER_ACTOR"
FINISH_TIMEOUT_S = 30.0  # more than the front needs for the requests that it accepted
UNUSED_S = 60.0  # that the guard of a killed driver may take to shut Serve down


@dataclass(frozen=True, kw_only=True)
class DriverSettings(FrontSettings):
    """Settings of the driver, in addition to those of a front.

    Attributes:
        bundles: their folders, the first served under the plain names.
        workers: replicas of each bundle at most, by operation.
        options: fields of :class:`handlers.service.options.ServingOptions`.
        logs: a folder of each node, created if it is missing; by default those of
            :class:`extensions.ray.serve.settings.ServeSettings` and of Ray.
        address: of a cluster; our own instance if there is none.
    """

    bundles: tuple[str, ...]
    workers: dict[str, int]
    options: dict[str, Any]
    logs: str | None
    address: str | None


def serve_settings(settings: DriverSettings) -> ServeSettings:
    """The application's part."""
    num_workers = len(settings.bundles) * sum(settings.workers.values())
    return ServeSettings(
        bundles=settings.bundles,
        replicas={name: (1, most) for name, most in settings.workers.items()},
        cpus=1.0,
        gpus=int(1e4 / num_workers) / 1e4 if settings.options["device"] == "cuda" else 0.0,
        backend=settings.options["backend"],
        device=settings.options["device"],
        allowed_hosts=settings.allowed_hosts,
        logs=settings.logs or LOGS,
    )


def run(settings: DriverSettings) -> None:
    """Serve until this process is asked to stop."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    num_workers = len(settings.bundles) * sum(settings.workers.values())
    try:
        api = (settings.host, settings.port)
        with ray_instance(settings.address, num_workers, api) as instance:
            from ray import serve

            _wait_until_unused(instance.ray, settings.address)
            instance.will_serve()
            try:
                _deploy(serve, settings)
                _serve_metrics(serve, settings)
            finally:
                try:
                    serve.shutdown()  # unless that is done
                    instance.has_stopped_serving()
                except Exception:  # Ray has no error of its own for it
                    logger.exception("Ray Serve was not shut down; trying again")
    except ClusterError as error:
        sys.exit(str(error))


def _wait_until_unused(ray: Any, address: str | None) -> None:
    """Wait until Serve does not run: the guard of a killed driver may still shut it down.

    Raises:
        ClusterError: it runs for too long, and so is not ours.
    """
    deadline = time.monotonic() + UNUSED_S
    while CONTROLLER in {a["name"] for a in ray.util.list_named_actors(all_namespaces=True)}:
        if time.monotonic() > deadline:
            raise ClusterError(
                f"--address {address}: Ray Serve runs on this cluster already: deploy with a "
                "configuration file, see docs/how-to/several-machines.md"
            )
        time.sleep(0.5)


def _host(settings: DriverSettings) -> str:
    """Where Ray listens: its proxies, and with HAProxy also the fronts, which HAProxy calls.

    Those of our own instance stay on loopback, where HAProxy looks for them and nobody can go
    around its limits: :func:`extensions.ray.serve.environment.own_haproxy` gives it the API's host.
    """
    if settings.host in LOOPBACK or (settings.address is None and has_haproxy()):
        return LOCAL
    return settings.host


def _deploy(serve: Any, settings: DriverSettings) -> None:
    from extensions.ray.serve.app import application

    logs = None if settings.logs is None else str(Path(settings.logs, "ray"))
    if logs is not None:
        Path(logs).mkdir(parents=True, exist_ok=True)
    log = serve.schema.LoggingConfig(logs_dir=logs, enable_access_log=False, log_level="WARNING")
    serve.start(
        proxy_location="HeadOnly" if settings.address is None else "EveryNode",
        http_options={
            "host": _host(settings),
            "port": settings.port,
            "keep_alive_timeout_s": listen.KEEP_ALIVE_S,
        },
        logging_config=log,
    )
    access = Access(token=settings.token, probe_secret=settings.probe_secret)
    serve.run(
        application(serve_settings(settings), access),
        name=APP,
        route_prefix="/",
        logging_config=log,
    )


def _serve_metrics(serve: Any, settings: DriverSettings) -> None:
    """Answer ``/metrics`` on the port of the metrics, until this process is asked to stop."""
    from extensions.ray.serve.app import METRICS

    handle, limits = serve.get_deployment_handle(METRICS, APP), Limits()
    front = serve.get_app_handle(APP)
    refusals = Counter[str]()

    async def text(request: Request) -> Answer:
        counted = dict(refusals)
        refusals.clear()
        await handle.update.remote([], counted, "")
        return metrics_answer(await handle.text.remote())

    @contextlib.asynccontextmanager
    async def build() -> AsyncIterator[listen.ServerApp]:
        metrics = Endpoint(text)
        find = functools.partial(only_metrics, metrics)  # its own server has the API's port
        try:
            yield listen.built(settings, limits, find, metrics, refusals)
        finally:
            await _stop(serve, front)

    sockets: list[socket.socket] = [
        listen.open_socket(host, settings.metrics_port) for host in settings.metrics_hosts
    ]
    listen.run_on(sockets, limits, build)


async def _stop(serve: Any, front: Any) -> None:
    """Let the front, of which there is one, answer what it accepted, and shut Serve down.

    In the event loop that the handles were used in: without it they cannot be closed.
    """
    try:
        async with asyncio.timeout(FINISH_TIMEOUT_S):
            await front.finish.remote()
    except Exception:  # Ray's, if the front has died
        logger.exception("requests may have been left without an answer")
    await serve.shutdown_async()


if __name__ == "__main__":
    run(DriverSettings.load(Path(sys.argv[1])))
