"""The front of TorchServe: forwards the documented requests to it, and answers everything else.

TorchServe is no longer maintained, reads bodies without a time limit, and has a weak token and many
paths that are not needed. Behind this front it listens on Unix domain sockets.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import sys
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from handlers.front import listen
from handlers.front.admission import Lane, Limits
from handlers.front.front import INFERRING, Answer, Endpoint, Request
from handlers.front.settings import FrontSettings
from handlers.torchserve import wire
from handlers.torchserve.errors import translate
from handlers.torchserve.exposition import by_convention
from serving.ingest.errors import ApiError, no_answer

logger = logging.getLogger(__name__)
PREDICTIONS = "/predictions/"
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


@dataclass(frozen=True, kw_only=True)
class ServerSettings(FrontSettings):
    """Settings of the front process of TorchServe.

    Attributes:
        inference_socket, metrics_socket: TorchServe's Unix domain sockets.
        server_key: TorchServe's inference key.
        models: number of workers by served name.
        identities: the model of each served name, ``NAME@HASH``.
    """

    inference_socket: str
    metrics_socket: str
    server_key: str = field(repr=False)
    models: dict[str, int]
    identities: dict[str, str]


class ModelServer:
    """The endpoints that TorchServe answers.

    Args:
        models: number of workers by served name.
        identities: the model of each served name, ``NAME@HASH``.
        limits: limits on the requests that it has at a time.
        inference: a client of TorchServe's inference address.
        metrics: a client of its metrics address.
        refusals: requests that the front refused, by the error's code.

    Attributes:
        metrics: the endpoint of its metrics.
    """

    def __init__(
        self,
        models: dict[str, int],
        identities: dict[str, str],
        limits: Limits,
        inference: aiohttp.ClientSession,
        metrics: aiohttp.ClientSession,
        refusals: Counter[str],
    ) -> None:
        infer = functools.partial(self._infer, inference)
        self._ping = Endpoint(infer)
        self.metrics = Endpoint(functools.partial(self._scrape, metrics))
        self._predictions = {
            name: Endpoint(
                infer,
                INFERRING,
                identities[name],
                Lane(limits, workers),
                _large_lane(limits, workers),
            )
            for name, workers in models.items()
        }
        self._refusals = refusals
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
        raise ApiError(
            404, "not_found", "there is no such path; there are /predictions/{operation} and /ping"
        )

    async def _infer(self, server: aiohttp.ClientSession, request: Request) -> Answer:
        return _translated(await self._ask(server, request))

    async def _scrape(self, server: aiohttp.ClientSession, request: Request) -> Answer:
        answer = _translated(await self._ask(server, request))
        if not dict(answer.headers).get("Content-Type", "").startswith("text/plain"):
            return answer
        text = by_convention(answer.body.decode(), self._refusals)
        return dataclasses.replace(answer, body=text.encode())

    async def _ask(self, server: aiohttp.ClientSession, request: Request) -> Answer:
        """Forward a request to the model server.

        Raises:
            ApiError: 503 ``unavailable``: the model server did not answer.
        """
        headers = wire.pack(request.content_type, request.is_probe)
        try:
            async with server.request(
                request.method, request.path, headers=headers, data=request.body or None
            ) as response:
                answer = Answer(response.status, _passing_headers(response), await response.read())
        except TimeoutError:
            raise no_answer() from None
        except (aiohttp.ClientError, OSError) as error:
            if self._was_reached:  # log once, not for each request
                logger.warning("the model server cannot be reached: %s", error)
            self._was_reached = False
            raise ApiError(
                503, "unavailable", "the model server cannot be reached: try again later"
            ) from None
        self._was_reached = True
        return answer


def _large_lane(limits: Limits, workers: int) -> Lane:
    """Lets each worker have one large request and another one wait.

    A worker of TorchServe takes all that waits as one batch.
    """
    return Lane(dataclasses.replace(limits, in_flight=(2 * workers,) * 3), workers)


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


@contextlib.asynccontextmanager
async def build_app(settings: ServerSettings, limits: Limits) -> AsyncIterator[listen.Built]:
    """Build the application for both ports, with its connections to TorchServe."""
    async with (
        _server(
            settings.inference_socket, limits, {"Authorization": f"Bearer {settings.server_key}"}
        ) as inference,
        _server(settings.metrics_socket, limits, {}) as metrics,
    ):
        refusals = Counter[str]()
        server = ModelServer(
            settings.models, settings.identities, limits, inference, metrics, refusals
        )
        yield listen.built(settings, limits, server.api, server.metrics, refusals)


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
