"""ASGI middleware that puts the gate before a classifier: only accepted images reach it."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import json
import logging
import math
import re
import time
from collections.abc import Callable, Collection, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from starlette.datastructures import UploadFile
from starlette.requests import ClientDisconnect, Request

from ade_base.messages import show
from ade_client.contract import DEFAULT, MAX_IMAGES
from serving.api.guard import SAFE_METHODS, App, Message, Receive, Send, error_answer, replay
from serving.gate import Gate, GateResult, TookTooLong
from serving.ingest.errors import ApiError, malformed, unusable
from serving.ingest.forms import check_charset, multipart
from serving.ingest.requests import MAX_BODY_BYTES, MULTIPART, pixels_to_resize
from serving.verdict.calibration_file import UnknownCalibration

logger = logging.getLogger(__name__)
Action = Literal["reject", "flag"]
MAX_BODY_S = 120.0  # for a body to arrive
MAX_HELD_BYTES = 256 * 2**20  # of all bodies together, above which only small ones are read
SMALL_BODY_BYTES = 2**20
_IMAGE_TYPE = re.compile(r"image/[a-z0-9.+-]+")


class GateMiddleware:
    """Checks the images of each request, and passes accepted requests on unchanged.

    The application finds the decisions in ``request.state.gate``. An image is the body
    (``Content-Type: image/…``) or a file of a form; a request may have as many images and pixels as
    one of the HTTP API. GET, HEAD and OPTIONS requests are passed on without their bodies. Other
    requests that carry no image, and web sockets, are refused, so that nothing reaches the app
    unchecked. A request whose image is an error (not an image, not scored) is refused whatever the
    options are; so is everything while the gate fails or takes too long.

    Args:
        app: the classifier's application.
        gate: makes the decisions.
        on_reject: ``reject`` answers 422; ``flag`` passes the request on, and the app has to look
            at the decisions.
        on_no_verdict: the same for images without a verdict.
        timeout_s: time for the decisions on one request, including waiting, above 0; after it the
            answer is 503. A request that has waited for half of it is not decided on any more.
        threads: number of threads that decide.
        waiting: largest number of requests that wait or are decided on, at least 1; further ones
            are answered 503 at once, before their bodies are read.
        calibration: returns the name of the calibration for a request, given its ASGI scope (path,
            headers). Default: the one named ``default``, or else the bundle's
            own. A name that the bundle lacks is answered 422.
        text_fields: names of the form fields that the app reads as text. Forms with others are
            refused: an app that takes ``bytes`` finds an image in a text field as well, and the
            gate checks files alone.

    Raises:
        ValueError: an option is not one of its values.
    """

    def __init__(
        self,
        app: App,
        gate: Gate,
        on_reject: Action = "reject",
        on_no_verdict: Action = "reject",
        timeout_s: float = 10.0,
        threads: int = 1,
        waiting: int = 32,
        calibration: Callable[[MutableMapping[str, Any]], str] | None = None,
        text_fields: Collection[str] = (),
    ) -> None:
        for name, action in (("on_reject", on_reject), ("on_no_verdict", on_no_verdict)):
            if action not in ("reject", "flag"):
                raise ValueError(f"{name} must be reject or flag, got {action!r}")
        if not timeout_s > 0 or not math.isfinite(timeout_s):
            raise ValueError(f"timeout_s must be above 0 and finite, got {timeout_s}")
        for option, number in (("threads", threads), ("waiting", waiting)):
            if number < 1:
                raise ValueError(f"{option} must be at least 1, got {number}")
        if calibration is not None and (
            not callable(calibration) or inspect.iscoroutinefunction(calibration)
        ):
            raise ValueError(
                "calibration must be a function that names a request's calibration, got "
                f"{calibration!r}"
            )
        if isinstance(text_fields, str):  # "in" would look for parts of it
            raise ValueError(f"text_fields must be a list of names, got {text_fields!r}")
        self._app = app
        self._gate = gate
        self._flagged = {
            "accept",
            *(
                choice
                for choice, action in (("reject", on_reject), ("no_verdict", on_no_verdict))
                if action == "flag"
            ),
        }
        self._timeout_s = timeout_s
        self._pool = ThreadPoolExecutor(threads, "gate")
        self._room = waiting
        self._held = 0  # bytes of the bodies of all requests
        self._calibration = calibration
        self._text_fields = frozenset(text_fields)

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # of a protocol whose messages are not checked
            raise RuntimeError(f"the gate does not check connections of the type {scope['type']}")
        if scope["method"] in SAFE_METHODS:
            await self._app(scope, _without_body(receive), send)
            return
        if await self._is_full(send):
            return
        parts: list[bytes] = []
        try:
            await self._decide(scope, receive, send, parts)
        finally:
            self._held -= sum(map(len, parts))

    async def _decide(
        self, scope: MutableMapping[str, Any], receive: Receive, send: Send, parts: list[bytes]
    ) -> None:
        """Read a body into ``parts``, decide on its images, and pass it on or refuse it."""
        try:
            await self._read(Request(scope, receive), parts)
            body = b"".join(parts)
            parts[:] = [body]  # it is held once
            images = await _images(scope, body, self._text_fields)
        except ClientDisconnect:
            return
        except ApiError as error:
            await _answer(send, error)
            return
        if await self._is_full(send):  # others may have come while the body was read
            return
        try:
            decisions = await self._check(scope, images)
        except ApiError as error:
            await _answer(send, error)
            return
        except UnknownCalibration as error:
            await _answer(send, unusable("unknown_calibration", str(error)))
            return
        except Exception as error:  # fails closed: whatever went wrong, the image is not accepted
            if isinstance(error, _TooLate):
                logger.warning("a request took too long, in the queue or to decode")
            else:
                logger.exception("the gate failed")
            await _answer(send, _unavailable())
            return
        if any(d.is_error or d.decision not in self._flagged for d in decisions):
            refused = unusable("not_accepted", "the gate did not accept the image")
            await _answer(send, refused, decisions)
            return
        # In a copy: some servers share the state of a connection between its requests.
        state = {**scope.get("state", {}), "gate": decisions}
        await self._app({**scope, "state": state}, replay(body, receive), send)

    async def _read(self, request: Request, parts: list[bytes]) -> None:
        """Read a body.

        Raises:
            ClientDisconnect: the client closed the connection.
            ApiError: the body is too large or too slow, or all bodies together are too large.
        """
        size = 0
        try:
            async with asyncio.timeout(MAX_BODY_S):
                async for part in request.stream():
                    parts.append(part)
                    size += len(part)
                    self._held += len(part)
                    if size > MAX_BODY_BYTES:
                        raise ApiError(
                            413,
                            "request_too_large",
                            f"a request may have at most {MAX_BODY_BYTES} bytes",
                        )
                    if size > SMALL_BODY_BYTES and self._held > MAX_HELD_BYTES:
                        raise ApiError(
                            503, "gate_busy", "the bodies of all requests are too large together"
                        )
        except TimeoutError:
            raise ApiError(
                408, "request_timeout", f"the body took longer than {MAX_BODY_S:g} s"
            ) from None

    async def _is_full(self, send: Send) -> bool:
        """Answer 503 if no further request may wait."""
        if self._room > 0:
            return False
        full = ApiError(503, "gate_busy", "too many requests wait for the gate: try again later")
        await _answer(send, full)
        return True

    async def _check(
        self, scope: MutableMapping[str, Any], images: list[bytes]
    ) -> list[GateResult]:
        """Ask the gate; a thread that takes too long is not replaced until it is done.

        Raises:
            ApiError: 413, the images have too many pixels.
        """
        name = DEFAULT if self._calibration is None else self._calibration(scope)
        # Work that starts later would end too late to be used, and make those behind it late, too.
        seconds = self._timeout_s / 2
        latest = time.monotonic() + seconds

        def check() -> list[GateResult]:
            if time.monotonic() > latest:
                raise _TooLate
            pixels_to_resize(images)  # here, because the headers of some files take long to read
            try:
                return self._gate.check(images, name, seconds)
            except TookTooLong:
                raise _TooLate from None

        work = asyncio.get_running_loop().run_in_executor(self._pool, check)
        self._room -= 1  # only now: the line above raises if it cannot start a thread
        work.add_done_callback(self._done)
        try:
            decisions = await asyncio.wait_for(asyncio.shield(work), self._timeout_s)
        except TimeoutError:
            if work.done():  # the gate's own, such as that of a network's file system
                raise
            raise _TooLate from None
        if len(decisions) != len(images):
            raise RuntimeError(f"{len(images)} images, {len(decisions)} decisions")
        return decisions

    def _done(self, work: asyncio.Future[list[GateResult]]) -> None:
        self._room += 1
        if not work.cancelled():
            work.exception()  # the request that waited has reported it


def _unavailable() -> ApiError:
    return ApiError(503, "gate_unavailable", "the gate could not decide: try again later")


class _TooLate(Exception):
    """The request has waited so long that nobody would get its decisions in time."""


async def _images(
    scope: MutableMapping[str, Any], body: bytes, text_fields: Collection[str]
) -> list[bytes]:
    """The files that a request carries: at least one, and no more than the gate takes.

    Raises:
        ApiError: it carries none, too many, or something that is not checked; or the disk is full.
    """
    request = Request(scope, replay(body))
    types = request.headers.getlist("content-type")
    if len(types) > 1:  # the application might follow another one
        raise malformed(f"a request has one Content-Type, this one has {len(types)}")
    kind = "".join(types).split(";")[0].strip().lower()
    if _IMAGE_TYPE.fullmatch(kind):
        return [body]
    if kind == MULTIPART:
        check_charset(types[0])
        multipart(types[0], body)
        try:
            async with request.form(max_files=MAX_IMAGES) as form:
                fields = form.multi_items()
                files = [await file.read() for _, file in fields if isinstance(file, UploadFile)]
        except OSError as error:  # such as of a full disk: large files are spooled there
            logger.exception("the gate failed")
            raise _unavailable() from error
        except Exception as error:  # Starlette raises errors of its own and of the parser
            reason = str(getattr(error, "detail", None) or getattr(error, "message", ""))
            if reason.startswith("Too many files"):
                raise ApiError(
                    413, "too_many_images", f"at most {MAX_IMAGES} images per request"
                ) from error
            raise malformed(f"the form cannot be parsed: {reason}".rstrip(": ")) from error
        for name, value in fields:
            if not isinstance(value, UploadFile) and name not in text_fields:
                raise ApiError(
                    400,
                    "unchecked_field",
                    f"the form's field {show(name)} is text, which is not checked: images must be "
                    "files, and the option text_fields allows other fields",
                )
        if files:
            return files
    raise ApiError(
        415,
        "no_image",
        "send an image as the body (Content-Type: image/...) or as a file of a form",
    )


def _without_body(receive: Receive) -> Receive:
    """An empty body in place of the request's; then whatever comes after it."""

    async def after_body() -> Message:
        while (message := await receive())["type"] == "http.request":
            pass
        return message

    return replay(b"", after_body)


async def _answer(send: Send, error: ApiError, decisions: list[GateResult] | None = None) -> None:
    headers, content = error_answer(error)
    if decisions is not None:
        body = error.body()
        body["error"]["decisions"] = [dataclasses.asdict(decision) for decision in decisions]
        content = json.dumps(body).encode()
    raw = [(name.encode(), value.encode()) for name, value in headers]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": content})
