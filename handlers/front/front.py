"""Reads requests and sends answers within limits, and gives every error one shape; what computes
the answers is the engine's part.
"""

from __future__ import annotations

import contextlib
import hmac
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from handlers.front.admission import (
    ClientGone,
    Lane,
    Limits,
    Memory,
    hang_up,
    overloaded,
    read_body,
)
from serving.api.errors import ApiError
from serving.api.guard import Receive, Scope, Send, error_answer, header_values, refuse
from serving.api.requests import PROBE_HEADER

READING = ("GET", "HEAD")
INFERRING = (*READING, "POST", "PUT")  # GET and HEAD have no body: the answer says what is missing
SLICE_BYTES = 256 * 2**10  # of an answer; the client's time to read runs for each


@dataclass(frozen=True)
class Request:
    """A whole request, as far as engines must know it.

    Attributes:
        method: ``HEAD`` has become ``GET``.
        path: without the query.
        headers: by their names in lower case; of several with one name the first.
        body: all of it.
        is_probe: whether it may claim to be no traffic.
    """

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytearray
    is_probe: bool

    @property
    def content_type(self) -> str | None:
        return self.headers.get("content-type")


@dataclass(frozen=True)
class Answer:
    """A whole answer."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes

    @classmethod
    def of_error(cls, error: ApiError, *headers: tuple[str, str]) -> Answer:
        fields, body = error_answer(error)
        return cls(error.status, [*fields, *headers], body)


@dataclass(frozen=True)
class Endpoint:
    """What answers at a path.

    Attributes:
        answer: may raise :class:`ApiError`.
        methods: that it takes.
        lane: where its requests wait for their turn, if they do.
    """

    answer: Callable[[Request], Awaitable[Answer]]
    methods: tuple[str, ...] = READING
    lane: Lane | None = None


class Front:
    """The ASGI application behind a port.

    Args:
        find: the endpoint at a path; raises :class:`ApiError` where there is none.
        limits: what clients may take.
        memory: of bodies and answers, of all ports together.
        probe_secret: see :class:`handlers.front.settings.FrontSettings`.
    """

    def __init__(
        self, find: Callable[[str], Endpoint], limits: Limits, memory: Memory, probe_secret: str
    ) -> None:
        self._find = find
        self._limits = limits
        self._memory = memory
        self._probe_secret = probe_secret.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope["path"]
        try:
            endpoint = self._find(path)
        except ApiError as error:
            await refuse(error, scope, receive, send)
            return
        if scope["method"] not in endpoint.methods:
            allowed = ", ".join(endpoint.methods)
            wrong = ApiError(405, "not_allowed", f"{path} takes {allowed}, not {scope['method']}")
            await refuse(wrong, scope, receive, send, [("allow", allowed)])
            return
        with self._memory.share() as share, contextlib.suppress(ClientGone):
            try:
                body = await read_body(scope, receive, share, self._limits)
            except ApiError as error:
                await refuse(error, scope, receive, send)
                return
            request = self._request(scope, body)
            del body
            try:
                async with endpoint.lane.turn(receive) if endpoint.lane else _at_once():
                    answer = await endpoint.answer(request)
            except ApiError as error:
                answer = Answer.of_error(error)
            del request
            if not share.hold(
                len(answer.body)
            ):  # answers that are read slowly would fill the memory
                answer = Answer.of_error(
                    overloaded("the answers that clients have yet to read are too large together")
                )
                share.hold(len(answer.body))
            try:
                async with share.waiting(None):
                    await _send_answer(answer, send)
            except TimeoutError:
                scope["extensions"]["ade.abort"]["connection"]()
                await hang_up(receive)

    def _request(self, scope: Scope, body: bytearray) -> Request:
        is_probe = any(
            hmac.compare_digest(value.encode(), self._probe_secret)
            for value in header_values(scope, PROBE_HEADER.lower())
        )
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1")
            for name, value in reversed(scope["headers"])
        }
        return Request(method, scope["path"], headers, body, is_probe)


def _at_once() -> contextlib.AbstractAsyncContextManager[None]:
    return contextlib.nullcontext()


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
