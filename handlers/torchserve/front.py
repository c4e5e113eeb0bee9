"""The front: the only TCP listener of the API.

It forwards the documented requests to TorchServe, within limits, and answers everything else
itself. TorchServe is no longer maintained, reads bodies without a time limit, and has a weak token
and many paths that are not needed. Behind this front it listens on Unix domain sockets.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hmac
import json
import logging
import os
import resource
import signal
import socket
import sys
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import uvicorn
import uvloop

from handlers.torchserve.admission import (
    ClientGone,
    Lane,
    Limits,
    Memory,
    hang_up,
    overloaded,
    read_body,
)
from handlers.torchserve.connections import BoundedProtocol
from handlers.torchserve.errors import translate
from handlers.torchserve.exposition import by_convention
from handlers.torchserve.forms import checked_type
from serving.api.errors import ApiError
from serving.api.guard import App, Guard, Receive, Scope, Send, error_answer, header_values, refuse
from serving.api.requests import PROBE_HEADER
from serving.ports import LOOPBACK

logger = logging.getLogger(__name__)
PREDICTIONS = "/predictions/"
ANY_ADDRESS = "0.0.0.0"
READING = ("GET", "HEAD")
INFERRING = (*READING, "POST", "PUT")  # to GET and HEAD the handler answers what is missing
# Headers of the connection, and those that the front sets itself.
NOT_PASSED = {
    "connection",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "content-length",
    "date",
    "server",
}
SLICE_BYTES = 256 * 2**10  # of an answer; the limit on the client's reading time is per slice
# Longer than nginx and HTTP libraries keep connections: if the client closes first, no request is
# lost.
KEEP_ALIVE_S = 75
STOP_S = 10


@dataclass(frozen=True)
class FrontSettings:
    """Settings of the front process.

    Attributes:
        host, port: address to listen on.
        metrics_port: port of the metrics, on loopback.
        exposes_metrics: whether the metrics are served on ``host`` too, where the token is required.
        inference_socket, metrics_socket: TorchServe's Unix domain sockets.
        server_key: TorchServe's inference key.
        models: served names.
        token: the token that clients must send, if any.
        allowed_hosts: see :class:`serving.api.guard.Guard`.
        probe_secret: value of the header ``X-Ade-Probe`` that marks health checks, which are not
            counted as traffic.
    """

    host: str
    port: int
    metrics_port: int
    exposes_metrics: bool
    inference_socket: str
    metrics_socket: str
    server_key: str = field(repr=False)
    models: tuple[str, ...]
    token: str | None = field(repr=False)
    allowed_hosts: tuple[str, ...]
    probe_secret: str = field(repr=False)

    def save(self, path: Path) -> None:
        """Write a new JSON file that only its owner can read.

        Raises:
            FileExistsError: the file exists.
        """
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w") as file:
            json.dump(dataclasses.asdict(self), file)

    @classmethod
    def load(cls, path: Path) -> FrontSettings:
        """Read the file that :meth:`save` wrote.

        Raises:
            ValueError: it is not JSON, or has other keys.
        """
        values = json.loads(path.read_text())
        expected = {f.name for f in dataclasses.fields(cls)}
        if not isinstance(values, dict) or set(values) != expected:
            raise ValueError(
                f"{path} must be a JSON object with the keys {', '.join(sorted(expected))}"
            )
        return cls(
            **{
                **values,
                "models": tuple(values["models"]),
                "allowed_hosts": tuple(values["allowed_hosts"]),
            }
        )

    @property
    def metrics_hosts(self) -> list[str]:
        """Where the metrics are served: always where this machine's programs look for them."""
        if not self.exposes_metrics or self.host in LOOPBACK:
            return [LOOPBACK[0]]
        return [self.host] if self.host == ANY_ADDRESS else [LOOPBACK[0], self.host]


@dataclass(frozen=True)
class Answer:
    """A complete answer."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes

    @classmethod
    def of_error(cls, error: ApiError, *headers: tuple[str, str]) -> Answer:
        fields, body = error_answer(error)
        return cls(error.status, [*fields, *headers], body)


class Front:
    """The ASGI applications of the two ports.

    Args:
        settings: settings of the process.
        limits: limits on clients.
        inference: a client of TorchServe's inference address.
        metrics: a client of its metrics address.
    """

    def __init__(
        self,
        settings: FrontSettings,
        limits: Limits,
        inference: aiohttp.ClientSession,
        metrics: aiohttp.ClientSession,
    ) -> None:
        self._settings = settings
        self._limits = limits
        self._inference = inference
        self._metrics = metrics
        self._memory = Memory(limits)
        self._lanes = {name: Lane(limits) for name in settings.models}
        self._refusals: Counter[str] = Counter()
        self._was_reached = True

    async def api(self, scope: Scope, receive: Receive, send: Send) -> None:
        """``/predictions/{name}`` and ``/ping``."""
        path: str = scope["path"]
        name = path.removeprefix(PREDICTIONS)
        if path == "/ping":
            await self._pass_on(scope, receive, send, READING, self._inference, path)
        elif path == PREDICTIONS + name and name in self._lanes:
            await self._pass_on(
                scope, receive, send, INFERRING, self._inference, path, self._lanes[name]
            )
        elif path == PREDICTIONS + name and name and "/" not in name:
            await refuse(
                ApiError(404, "unknown_model", "the service has no model of this name"),
                scope,
                receive,
                send,
            )
        else:
            await refuse(
                ApiError(404, "not_found", "there is /predictions/{operation} and /ping"),
                scope,
                receive,
                send,
            )

    async def metrics(self, scope: Scope, receive: Receive, send: Send) -> None:
        """``/metrics``."""
        if scope["path"] == "/metrics":
            await self._pass_on(scope, receive, send, READING, self._metrics, "/metrics")
        else:
            await refuse(ApiError(404, "not_found", "there is /metrics"), scope, receive, send)

    async def _pass_on(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        methods: tuple[str, ...],
        server: aiohttp.ClientSession,
        path: str,
        lane: Lane | None = None,
    ) -> None:
        if scope["method"] not in methods:
            error = ApiError(
                405, "not_allowed", f"{path} takes {', '.join(methods)}, not {scope['method']}"
            )
            await refuse(error, scope, receive, send, [("allow", ", ".join(methods))])
            return
        with self._memory.share() as share, contextlib.suppress(ClientGone):
            try:
                body = await read_body(scope, receive, share, self._limits)
            except ApiError as error:
                self._count(error)
                await refuse(error, scope, receive, send)
                return
            method = "GET" if scope["method"] == "HEAD" else scope["method"]
            try:
                headers = self._request_headers(scope, body)
                async with lane.turn(receive) if lane else contextlib.nullcontext():
                    answer = await self._ask(server, method, path, headers, body)
                # Answers that are read slowly would fill the memory.
                if not share.hold(len(answer.body)):
                    raise overloaded(
                        "the answers that clients have yet to read are too large together"
                    )
            except ApiError as error:
                self._count(error)
                answer = Answer.of_error(error)
                share.hold(len(answer.body))
            del body
            try:
                async with share.waiting(None):
                    await _send_answer(answer, send)
            except TimeoutError:
                scope["extensions"]["ade.abort"]["connection"]()
                await hang_up(receive)

    def _count(self, error: ApiError) -> None:
        self._refusals[error.code] += 1

    def _request_headers(self, scope: Scope, body: bytearray) -> dict[str, str]:
        """Headers for the model server: the type of the body, and whether this is a health check.

        Raises:
            ApiError: the body is a form that it would not read as it is.
        """
        headers = {}
        for value in header_values(scope, "content-type")[:1]:
            if content_type := checked_type(value, body):
                headers["Content-Type"] = content_type
        for value in header_values(scope, PROBE_HEADER.lower()):
            if hmac.compare_digest(value.encode(), self._settings.probe_secret.encode()):
                headers[PROBE_HEADER] = "1"
        return headers

    async def _ask(
        self,
        server: aiohttp.ClientSession,
        method: str,
        path: str,
        headers: dict[str, str],
        body: bytearray,
    ) -> Answer:
        """Forward a request to the model server.

        Raises:
            ApiError: 503 ``unavailable``: the model server did not answer.
        """
        try:
            async with server.request(method, path, headers=headers, data=body or None) as response:
                answer = Answer(response.status, _passing_headers(response), await response.read())
        except TimeoutError:
            raise ApiError(503, "unavailable", "the model server did not answer in time") from None
        except (aiohttp.ClientError, OSError) as error:
            if self._was_reached:  # log once, not for each request
                logger.warning("the model server cannot be reached: %s", error)
            self._was_reached = False
            raise ApiError(
                503, "unavailable", "the model server cannot be reached: try again later"
            ) from None
        self._was_reached = True
        return self._metrics_answer(answer) if server is self._metrics else _translated(answer)

    def _metrics_answer(self, answer: Answer) -> Answer:
        if not dict(answer.headers).get("Content-Type", "").startswith("text/plain"):
            return answer
        text = by_convention(answer.body.decode(), self._refusals)
        return dataclasses.replace(answer, body=text.encode())


def _passing_headers(response: aiohttp.ClientResponse) -> list[tuple[str, str]]:
    named = {
        name.strip().lower()
        for value in response.headers.getall("connection", [])
        for name in value.split(",")
    }
    return [
        (name, value)
        for name, value in response.headers.items()
        if name.lower() not in NOT_PASSED | named
    ]


def _translated(answer: Answer) -> Answer:
    """Convert an error of TorchServe, ``{"code", "type", "message"}`` or empty, to the API's shape.

    Other answers are returned unchanged.
    """
    if answer.status < 400:
        return answer
    found = None
    with contextlib.suppress(ValueError):
        found = json.loads(answer.body or b"{}")
    if not isinstance(found, dict) or found and not {"code", "type", "message"} <= set(found):
        return answer
    identity = [(name, value) for name, value in answer.headers if name.lower() == "x-request-id"]
    return Answer.of_error(
        translate(answer.status, str(found.get("type")), str(found.get("message"))),
        *identity,
    )


async def _send_answer(answer: Answer, send: Send) -> None:
    headers = [
        (name.lower().encode("latin-1"), value.encode("latin-1", "replace"))
        for name, value in [*answer.headers, ("content-length", str(len(answer.body)))]
    ]
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    view = memoryview(answer.body)
    for first in range(0, max(1, len(view)), SLICE_BYTES):
        await send(
            {
                "type": "http.response.body",
                "body": view[first : first + SLICE_BYTES],
                "more_body": first + SLICE_BYTES < len(view),
            }
        )


@contextlib.asynccontextmanager
async def build_app(settings: FrontSettings, limits: Limits) -> AsyncIterator[App]:
    """Build the application for both ports, with its connections to TorchServe."""
    async with (
        _server(
            settings.inference_socket, limits, {"Authorization": f"Bearer {settings.server_key}"}
        ) as inference,
        _server(settings.metrics_socket, limits, {}) as metrics,
    ):
        front = Front(settings, limits, inference, metrics)
        api = Guard(front.api, settings.allowed_hosts, settings.token)
        reading = Guard(front.metrics, settings.allowed_hosts)
        remote_reading = Guard(front.metrics, settings.allowed_hosts, settings.token)

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            host, port = scope["server"]
            if port == settings.metrics_port:
                await (reading if host in LOOPBACK else remote_reading)(scope, receive, send)
            else:
                await api(scope, receive, send)

        yield app


def _server(path: str, limits: Limits, headers: dict[str, str]) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        "http://localhost",
        connector=aiohttp.UnixConnector(path, limit=0),
        headers=headers,
        auto_decompress=False,
        skip_auto_headers=("Content-Type", "User-Agent", "Accept", "Accept-Encoding"),
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=limits.upstream_s),
    )


async def serve(settings: FrontSettings, limits: Limits, sockets: list[socket.socket]) -> None:
    """Serve both ports until a signal arrives."""
    async with build_app(settings, limits) as app:
        protocol: Any = functools.partial(BoundedProtocol, limits)
        config = uvicorn.Config(
            app,
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
            timeout_graceful_shutdown=STOP_S,
        )
        await uvicorn.Server(config).serve(sockets)


def run(settings: FrontSettings, limits: Limits | None = None) -> None:
    """Run the front in this process until it is asked to stop."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it warns of each invalid form
    # uvicorn raises the signal again after it has stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = min(hard, 2**16) if hard != resource.RLIM_INFINITY else 2**16
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, files), hard))
    sockets = [
        _listen(settings.host, settings.port),
        *(_listen(host, settings.metrics_port) for host in settings.metrics_hosts),
    ]
    uvloop.run(serve(settings, limits or Limits(), sockets))


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=1024)


if __name__ == "__main__":
    run(FrontSettings.load(Path(sys.argv[1])))
