"""The process of a front: its sockets, and uvicorn with bounds on connections."""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import resource
import signal
import socket
import sys
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import uvicorn
import uvloop

from ade_base.ports import LOOPBACK
from handlers.front.admission import Limits, Memory
from handlers.front.exposition import only_metrics
from handlers.front.front import Endpoint, Front
from handlers.front.settings import FrontSettings
from serving.api.guard import App, Guard, Receive, Scope, Send
from serving.api.protocol import BoundedProtocol

# Longer than nginx and HTTP libraries keep connections: if the client closes first, no request is
# lost.
KEEP_ALIVE_S = 75
STOP_S = 10


@dataclass(frozen=True)
class ServerApp:
    """An application with what its server needs.

    Attributes:
        app: the application.
        on_stop: called when the process is asked to stop.
        refusals: counts the errors that the front answers, by their code.
    """

    app: App
    on_stop: Callable[[], None] = lambda: None
    refusals: Counter[str] = field(default_factory=Counter)


Build = Callable[[], contextlib.AbstractAsyncContextManager[ServerApp]]


def built(
    settings: FrontSettings,
    limits: Limits,
    find: Callable[[str], Endpoint],
    metrics: Endpoint,
    refusals: Counter[str],
    open_paths: Collection[str] = (),
    on_stop: Callable[[], None] = lambda: None,
) -> ServerApp:
    """One application for both ports; the metrics need no token on loopback.

    Args:
        settings: of the process.
        limits: on clients.
        find: see :class:`handlers.front.front.Front`.
        metrics: answers on the metrics port.
        refusals: counts the requests that no worker answered, by the error's code.
        open_paths: paths of the API that need no token, such as those of health checks.
        on_stop: see :class:`ServerApp`.
    """
    memory = Memory(limits)
    api, reading = (
        Front(each, limits, memory, settings.probe_secret, counted)
        for each, counted in (
            (find, refusals),
            # Not counted: the service itself asks this port whether the process hangs.
            (functools.partial(only_metrics, metrics), Counter[str]()),
        )
    )
    hosts, token = settings.allowed_hosts, settings.token
    of_api = Guard(api, hosts, token, refusals)
    public_guard = Guard(api, hosts, None, refusals)
    of_metrics = Guard(reading, hosts, None, refusals)
    of_remote_metrics = Guard(reading, hosts, token, refusals)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        host, port = scope["server"]
        if port == settings.metrics_port:
            await (of_metrics if host in LOOPBACK else of_remote_metrics)(scope, receive, send)
        elif scope["path"] in open_paths:
            await public_guard(scope, receive, send)
        else:
            await of_api(scope, receive, send)

    return ServerApp(app, on_stop, refusals)


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, on_stop: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_stop = on_stop

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._on_stop()
        await super().shutdown(sockets)


def run(settings: FrontSettings, limits: Limits, build: Build, stop_s: int = STOP_S) -> None:
    """Run the front in this process until it is asked to stop.

    Args:
        settings: settings of the process.
        limits: limits on clients.
        build: builds the application for both ports, and closes it in the end.
        stop_s: seconds that accepted requests may take after a signal.
    """
    sockets = [
        open_socket(settings.host, settings.port),
        *(open_socket(host, settings.metrics_port) for host in settings.metrics_hosts),
    ]
    run_on(sockets, limits, build, stop_s)


def run_on(
    sockets: list[socket.socket], limits: Limits, build: Build, stop_s: int = STOP_S
) -> None:
    """The same on open sockets."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    # uvicorn raises the signal again after it has stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = min(hard, 2**16) if hard != resource.RLIM_INFINITY else 2**16
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, files), hard))
    uvloop.run(_serve(limits, build, stop_s, sockets))


async def _serve(limits: Limits, build: Build, stop_s: int, sockets: list[socket.socket]) -> None:
    async with build() as built:
        gc.collect()
        gc.freeze()  # what lasts as long as the process need not be searched again and again
        protocol: Any = functools.partial(BoundedProtocol, limits, Counter(), built.refusals)
        config = uvicorn.Config(
            built.app,
            http=protocol,
            ws="none",
            lifespan="off",
            interface="asgi3",
            access_log=False,
            log_config=None,
            log_level="error",
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=stop_s,
        )
        await _Server(config, built.on_stop).serve(sockets)


def open_socket(host: str, port: int) -> socket.socket:
    """Listen on an address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=1024)
