"""The front: reads requests and sends answers within limits, and gives every error one shape.

Its process is the only TCP listener of the API. The engine computes the answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hmac
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from ade_base.messages import show
from ade_client.contract import MODEL_HEADER, PROBE_HEADER
from handlers.front.admission import (
    ClientGone,
    InFlightLimit,
    Limits,
    Memory,
    read_body,
    unless_gone,
)
from serving.api.guard import Message, Receive, Scope, Send, error_answer, header_values, refuse
from serving.ingest.errors import ApiError, internal_error, malformed, overloaded, shaped, stopping

logger = logging.getLogger(__name__)
READING = ("GET", "HEAD")
# GET and HEAD get the engine's error that says what is missing.
INFERRING = (*READING, "POST", "PUT")
SLICE_BYTES = 256 * 2**10  # of an answer: no more of it is in memory after the request's end


@dataclass(frozen=True)
class Request:
    """A complete request.

    Attributes:
        method: ``GET`` for a ``HEAD`` request.
        path: without the query.
        headers: by their names in lower case; of several with one name the first.
        content_type: of the body, as sent; empty if there is none.
        body: the complete body.
        is_probe: whether it is a health check, which is not counted as traffic.
        arrived: when it was complete, by ``time.perf_counter``; it may then wait for its turn.
    """

    method: str
    path: str
    headers: Mapping[str, str]
    content_type: str
    body: bytearray
    is_probe: bool
    arrived: float = field(default_factory=time.perf_counter)

    @property
    def model(self) -> str:
        """The only model that may answer, ``NAME@HASH``; empty if any may."""
        return self.headers.get(MODEL_HEADER.lower(), "")


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


@dataclass(frozen=True)
class Endpoint:
    """The part of the engine that answers at a path.

    Attributes:
        answer: computes the answer; may raise :class:`ApiError`.
        methods: allowed methods.
        model: that computes the answer, ``NAME@HASH``; empty if none does.
        in_flight: bounds the number of its requests, if workers compute the answers. ``answer`` is
            cancelled then if the client leaves.
        route: returns the endpoint that answers a request, if that is not this one.
        hold: entered while the endpoint has a request, of which there may be several.
    """

    answer: Callable[[Request], Awaitable[Answer]]
    methods: tuple[str, ...] = READING
    model: str = ""
    in_flight: InFlightLimit | None = None
    route: Callable[[Request], Endpoint] | None = None
    hold: contextlib.AbstractContextManager[None] = contextlib.nullcontext()


class Front:
    """The ASGI application of a port.

    Args:
        find: returns the endpoint at a path; raises :class:`ApiError` if there is none.
        limits: limits on clients.
        memory: counts the bodies and answers of all ports.
        probe_secret: see :class:`handlers.front.settings.FrontSettings`.
        refusals: counts the requests that no worker answered, by the error's code.
    """

    def __init__(
        self,
        find: Callable[[str], Endpoint],
        limits: Limits,
        memory: Memory,
        probe_secret: str,
        refusals: Counter[str],
    ) -> None:
        self._find = find
        self._limits = limits
        # For paths that are only read: they need no body, and some of them no token.
        self._limits_of_reading = dataclasses.replace(limits, body_bytes=limits.free_bytes)
        self._memory = memory
        self._probe_secret = probe_secret.encode()
        self._refusals = refusals

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # only Ray's server accepts them
            await send({"type": "websocket.close", "code": 1008})
            return
        has_begun = False

        async def begin(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._respond(scope, receive, begin)
        except (Exception, asyncio.CancelledError) as failure:
            if has_begun:  # the server closes the connection
                raise
            if isinstance(failure, asyncio.CancelledError):
                error = stopping()
            else:
                logger.exception("a request to %s failed", scope["path"])
                error = internal_error()
            self._refusals[error.code] += 1
            # The body may not have arrived.
            answer = Answer.of_error(shaped(error, scope["path"]), ("connection", "close"))
            await _send_answer(answer, send)

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope["path"]
        try:
            endpoint = self._find(path)
        except ApiError as error:
            self._refusals[error.code] += 1
            await refuse(error, scope, receive, send)
            return
        if scope["method"] not in endpoint.methods:
            allowed = ", ".join(endpoint.methods)
            wrong = ApiError(405, "not_allowed", f"{path} takes {allowed}, not {scope['method']}")
            self._refusals[wrong.code] += 1
            await refuse(wrong, scope, receive, send, [("allow", allowed)])
            return
        limits = self._limits_of_reading if endpoint.methods == READING else self._limits
        with self._memory.reserve() as reservation, contextlib.suppress(ClientGone):
            try:
                body = await read_body(scope, receive, reservation, limits)
            except ApiError as error:
                self._refusals[error.code] += 1
                await refuse(error, scope, receive, send)
                return
            try:
                answer = await self._ask(endpoint, scope, receive, body)
                # Answers that are read slowly would fill the memory.
                if not reservation.hold(len(answer.body)):
                    raise overloaded(
                        "the answers that clients have yet to read are too large together"
                    )
            except ApiError as error:
                self._refusals[error.code] += 1
                answer = Answer.of_error(shaped(error, path))
                reservation.hold(len(answer.body))
            del body
            await _send_answer(answer, send)

    async def _ask(
        self, endpoint: Endpoint, scope: Scope, receive: Receive, body: bytearray
    ) -> Answer:
        """Ask the engine when it is the request's turn.

        Raises:
            ApiError: the engine did not answer, or cannot read the request.
            ClientGone: the client closed the connection before the request was computed.
        """
        request = self._request(scope, body, endpoint)
        if endpoint.route is not None:
            endpoint = endpoint.route(request)
        if endpoint.model and request.model not in ("", endpoint.model):
            raise other_model(request.model, endpoint.model)
        in_flight = endpoint.in_flight
        if request.is_probe and in_flight is not None and in_flight.is_answering():
            # Its turn might come too late for it, and a busy service is not a broken one.
            error = shaped(overloaded("other requests come first"), request.path)
            return Answer.of_error(error, (MODEL_HEADER, endpoint.model))
        if in_flight is None:
            with endpoint.hold:
                return await endpoint.answer(request)

        async def compute() -> Answer:
            counted = contextlib.nullcontext() if request.is_probe else in_flight.clients
            with counted, endpoint.hold:
                async with in_flight.turn():
                    return await endpoint.answer(request)

        answer = await unless_gone(compute(), receive)
        if not request.is_probe and answer.status < 500:
            in_flight.has_answered()
        return answer

    def _request(self, scope: Scope, body: bytearray, endpoint: Endpoint) -> Request:
        """The request of an endpoint.

        Raises:
            ApiError: 400, there are parameters in the query string, which engines ignore; 415, the
                body is compressed.
        """
        is_probe = any(
            hmac.compare_digest(value.encode(), self._probe_secret)
            for value in header_values(scope, PROBE_HEADER.lower())
        )
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1")
            for name, value in reversed(scope["headers"])
        }
        content_type = headers.get("content-type", "")
        if endpoint.in_flight is not None and scope.get("query_string"):
            raise malformed(
                "parameters are fields of a form or of JSON, not of the query string, got "
                + show(scope["query_string"].decode("latin-1"))
            )
        coding = headers.get("content-encoding", "identity")
        if endpoint.in_flight is not None and coding.lower() != "identity":
            raise ApiError(
                415,
                "unsupported_encoding",
                f"bodies must not be compressed, got Content-Encoding: {show(coding)}",
            )
        return Request(method, scope["path"], headers, content_type, body, is_probe)


def other_model(wanted: str, model: str) -> ApiError:
    """412: the request is for another model than the one that would answer, or has answered."""
    return ApiError(
        412,
        "other_model",
        f"the request is for {show(wanted)} ({MODEL_HEADER}), but {model} answers here",
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
                "body": bytes(view[first : first + SLICE_BYTES]),
                "more_body": first + SLICE_BYTES < len(view),
            }
        )
