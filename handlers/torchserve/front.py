"""The front before TorchServe: passes on what the API promises, within limits, and answers the rest
itself.

TorchServe gets no fixes, reads bodies without a time limit, has a weak token and many paths that
nobody needs. Behind this front it listens on Unix domain sockets.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from handlers.front import listen
from handlers.front.admission import Lane, Limits, Memory
from handlers.front.front import INFERRING, Answer, Endpoint, Front, Request
from handlers.front.settings import FrontSettings
from handlers.torchserve.errors import translate
from serving.api.errors import ApiError
from serving.api.requests import PROBE_HEADER

logger = logging.getLogger(__name__)
PREDICTIONS = "/predictions/"
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
}  # of a connection, or the front's own


@dataclass(frozen=True, kw_only=True)
class ServerSettings(FrontSettings):
    """What the front before TorchServe must know besides.

    Attributes:
        inference_socket, metrics_socket: TorchServe's Unix domain sockets.
        server_key: TorchServe's inference key.
        models: names that are served.
    """

    inference_socket: str
    metrics_socket: str
    server_key: str = field(repr=False)
    models: tuple[str, ...]


class ModelServer:
    """TorchServe as what answers behind the front.

    Args:
        models: names that are served.
        limits: bound what it holds at once.
        inference: a client of TorchServe's inference address.
        metrics: a client of its metrics address.
    """

    def __init__(
        self,
        models: tuple[str, ...],
        limits: Limits,
        inference: aiohttp.ClientSession,
        metrics: aiohttp.ClientSession,
    ) -> None:
        self._ping = Endpoint(functools.partial(self._ask, inference))
        self._metrics = Endpoint(functools.partial(self._ask, metrics))
        self._predictions = {
            name: Endpoint(functools.partial(self._ask, inference), INFERRING, Lane(limits))
            for name in models
        }
        self._was_reached = True

    def api(self, path: str) -> Endpoint:
        """``/predictions/{name}`` and ``/ping``.

        Raises:
            ApiError: 404.
        """
        name = path.removeprefix(PREDICTIONS)
        if path == "/ping":
            return self._ping
        if path == PREDICTIONS + name and name in self._predictions:
            return self._predictions[name]
        if path == PREDICTIONS + name and name and "/" not in name:
            raise ApiError(404, "unknown_model", "the service has no model of this name")
        raise ApiError(404, "not_found", "there is /predictions/{operation} and /ping")

    def metrics(self, path: str) -> Endpoint:
        """``/metrics``.

        Raises:
            ApiError: 404.
        """
        if path == "/metrics":
            return self._metrics
        raise ApiError(404, "not_found", "there is /metrics")

    async def _ask(self, server: aiohttp.ClientSession, request: Request) -> Answer:
        """TorchServe's answer.

        Raises:
            ApiError: 503 ``unavailable``, because it did not answer.
        """
        headers = {} if request.content_type is None else {"Content-Type": request.content_type}
        if request.is_probe:
            headers[PROBE_HEADER] = "1"
        try:
            async with server.request(
                request.method, request.path, headers=headers, data=request.body or None
            ) as response:
                answer = Answer(response.status, _passing_headers(response), await response.read())
        except TimeoutError:
            raise ApiError(503, "unavailable", "the model server did not answer in time") from None
        except (aiohttp.ClientError, OSError) as error:
            if self._was_reached:  # one line, not one for each request
                logger.warning("the model server cannot be reached: %s", error)
            self._was_reached = False
            raise ApiError(
                503, "unavailable", "the model server cannot be reached: try again later"
            ) from None
        self._was_reached = True
        return _translated(answer)


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
    """The answer in the API's shape where TorchServe gave it in its own, ``{"code", "type",
    "message"}`` or nothing.
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


@contextlib.asynccontextmanager
async def build_app(settings: ServerSettings, limits: Limits) -> AsyncIterator[listen.Built]:
    """The application for both ports, with its connections to TorchServe."""
    async with (
        _server(
            settings.inference_socket, limits, {"Authorization": f"Bearer {settings.server_key}"}
        ) as inference,
        _server(settings.metrics_socket, limits, {}) as metrics,
    ):
        server, memory = ModelServer(settings.models, limits, inference, metrics), Memory(limits)
        api, reading = (
            Front(find, limits, memory, settings.probe_secret)
            for find in (server.api, server.metrics)
        )
        yield listen.Built(listen.guarded(settings, api, reading))


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


def run(settings: ServerSettings, limits: Limits | None = None) -> None:
    """Run the front in this process until it is asked to stop."""
    limits = limits or Limits()
    listen.run(settings, limits, functools.partial(build_app, settings, limits))


if __name__ == "__main__":
    run(ServerSettings.load(Path(sys.argv[1])))
