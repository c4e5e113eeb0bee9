"""Answers batches of requests: parse, decode, compute together, respond.

This is all that an HTTP server has to call. If a request is invalid or fails, the others still get
their normal answers.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ade_base.pictures.decoders import DecoderError
from ade_client.contract import MODEL_HEADER
from serving.api.journal import Journal
from serving.api.operations.base import check_available
from serving.api.operations.registry import OPERATIONS
from serving.api.responses import MAX_ANSWER_BYTES, Response, error_response
from serving.api.telemetry import Stopwatch, Telemetry
from serving.engine.engine import InferenceEngine
from serving.ingest.errors import ApiError, internal_error, is_out_of_memory, overloaded
from serving.ingest.picture import LookOf
from serving.ingest.requests import (
    MAX_REQUEST_PIXELS,
    Each,
    FilesRequest,
    ImagesRequest,
    RawRequest,
    decode_images,
)

logger = logging.getLogger(__name__)
# Limits of one batch of requests, well within those of the server for a worker. A single request
# reaches none but that of decoding, and only with files that were made to be slow.
MAX_BATCH_PIXELS = 4 * MAX_REQUEST_PIXELS  # of images before resizing
MAX_BATCH_BYTES = MAX_ANSWER_BYTES  # of all answers together, which the server takes in one message
MAX_DECODE_S = 20.0  # after which no further image is decoded
MAX_BATCH_S = 20.0  # after which no further pass is started
PASS_ROWS = 256  # of a graph, computed before the clock is read again


class Service:
    """One operation of one bundle.

    Args:
        operation: ``sample``, ``encode``, ``reconstruct`` or ``score``.
        engine: has the operation's graphs loaded.
        threads: decode image files.
        journal: where requests are logged.

    Attributes:
        is_exhausted: a single request did not fit into memory; the worker should be restarted.
    """

    def __init__(
        self,
        operation: str,
        engine: InferenceEngine,
        threads: int = 1,
        journal: Journal | None = None,
    ) -> None:
        self.operation = OPERATIONS[operation]
        self.engine = engine
        self.telemetry = Telemetry(
            engine.bundle.model_id, engine.backend.name, operation == "score"
        )
        self.is_exhausted = False
        self._journal = journal
        self._each: Each = ThreadPoolExecutor(threads, "decode").map if threads > 1 else map

    def answer(self, requests: Iterable[RawRequest]) -> list[Response]:
        """Answer each request, in order. Never raises, whatever a client sent.

        Args:
            requests: the time that an iterator takes to read them counts as parsing.
        """
        watch = Stopwatch()
        deadline = time.monotonic() + MAX_BATCH_S
        with watch("parse"):
            requests = list(requests)
            parsed = [self._parse(request) for request in requests]
        with watch("decode"):
            decoded = self._decode(_within(MAX_BATCH_PIXELS, parsed))
        answers, count = self._in_passes(decoded, deadline, watch)
        with watch("encode"):
            answers = [
                answer if request.translate is None else request.translate(answer)
                for request, answer in zip(requests, answers, strict=True)
            ]
        stages = ", ".join(
            f"{stage};dur={1000 * seconds:.2f}" for stage, seconds in watch.seconds.items()
        )
        for answer in answers:
            answer.headers.update(
                {
                    MODEL_HEADER: self.engine.bundle.model_id,
                    "X-Ade-Backend": self.engine.backend.name,
                    "X-Ade-Batch": str(count),
                    "Server-Timing": stages,
                }
            )
        self._report(requests, answers, count, watch)
        return answers

    def _in_passes(
        self, parsed: list[Any], deadline: float, watch: Stopwatch
    ) -> tuple[list[Response], int]:
        """Compute in passes while there is time and room for answers.

        The remaining requests are answered 503. The first pass is always computed, so that a single
        request is always answered.

        Args:
            parsed: parsed requests, or errors.
            deadline: after which no further pass is started.
            watch: measures the stages.

        Returns:
            The answers, and the number of images that were computed.
        """
        answers = {i: error_response(p) for i, p in enumerate(parsed) if isinstance(p, ApiError)}
        waiting = {i: p for i, p in enumerate(parsed) if not isinstance(p, ApiError)}
        room, count = MAX_BATCH_BYTES, 0
        while waiting:
            is_first = not count
            chosen = (
                self._next_pass(waiting, room, is_first)
                if is_first or time.monotonic() < deadline
                else []
            )
            if not chosen:
                answers |= {i: error_response(_busy()) for i in waiting}
                break
            requests = [waiting.pop(i) for i in chosen]
            for i, answer in zip(chosen, self._together(requests, watch), strict=True):
                answers[i] = answer
                room -= len(answer.body)
            count += sum(request.count for request in requests)
        return [answers[i] for i in range(len(parsed))], count

    def _next_pass(self, waiting: dict[int, Any], room: int, is_first: bool) -> list[int]:
        """Choose the requests to compute together: the first ones whose answers have room."""
        chosen: list[int] = []
        rows = 0
        for i, request in waiting.items():
            size = self.operation.answer_bytes(request, self.engine.bundle)
            if size > room and (chosen or not is_first):
                continue  # there may be room later, since answers are often shorter than expected
            own_rows = self.operation.rows(request)
            if chosen and rows + own_rows > PASS_ROWS:
                break
            chosen.append(i)
            rows += own_rows
            room -= size
        return chosen

    def _together(self, requests: list[Any], watch: Stopwatch) -> list[Response]:
        try:
            return self._compute(requests, watch)
        except Exception:  # one request must not fail the others: compute each alone
            logger.exception("%s: a batch of %d requests failed", self._name, len(requests))
            return [self._alone(request, watch) for request in requests]

    def _report(
        self, requests: Sequence[RawRequest], answers: list[Response], count: int, watch: Stopwatch
    ) -> None:
        """Add to metrics and log, except for probes."""
        real = [(r, a) for r, a in zip(requests, answers, strict=True) if not r.probe]
        if not real:
            return
        self.telemetry.observe_batch(
            [(a.status, a.error.code if a.error else "") for _, a in real], count, watch.seconds
        )
        if self._journal is None:
            return
        stages = {stage: round(1000 * seconds, 2) for stage, seconds in watch.seconds.items()}
        self._journal.write(
            {
                "operation": self._name,
                "id": request.id,
                "status": answer.status,
                "batch": count,
                "ms": stages,
                **(
                    {}
                    if answer.error is None
                    else {"code": answer.error.code, "message": answer.error.message}
                ),
            }
            for request, answer in real
        )

    @property
    def _name(self) -> str:
        return self.operation.name

    def _parse(self, request: RawRequest) -> Any:
        """The request as the operation reads it, or its error."""
        if request.error is not None:
            return request.error
        try:
            check_available(self._name, self.engine.bundle)
            return self.operation.parse(request, self.engine.bundle)
        except ApiError as error:
            return error
        except Exception:
            logger.exception("%s: a request could not be parsed", self._name)
            return internal_error()

    def _decode(self, parsed: list[Any]) -> list[Any]:
        """Decode the images of parsed requests, in order, while there is time.

        Requests whose images are not all decoded are answered 503.
        """
        deadline, late = time.monotonic() + MAX_DECODE_S, _busy()

        def each(prepare: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[Any]:
            return self._each(
                lambda task: prepare(task) if time.monotonic() < deadline else late, tasks
            )

        files = [p for p in parsed if isinstance(p, FilesRequest)]
        decoded: Iterator[ImagesRequest[Any] | ApiError]
        try:
            made = decode_images(files, self.engine.image_shape, each, self._look_of)
            decoded = iter([late if late in request.images else request for request in made])
        except Exception:  # one request must not fail the others: decode each alone
            logger.exception(
                "%s: pictures of %d requests could not be decoded", self._name, len(files)
            )
            decoded = iter([self._decode_alone(f, each, late) for f in files])
        return [next(decoded) if isinstance(p, FilesRequest) else p for p in parsed]

    def _decode_alone(
        self, files: FilesRequest[Any], each: Each, late: ApiError
    ) -> ImagesRequest[Any] | ApiError:
        try:
            (request,) = decode_images([files], self.engine.image_shape, each, self._look_of)
        except Exception as error:
            return self._failure(error)
        return late if late in request.images else request

    def _look_of(self, parameters: Any) -> LookOf:
        look_of: LookOf = self.operation.look_of(parameters, self.engine)
        return look_of

    def _alone(self, request: Any, watch: Stopwatch) -> Response:
        try:
            return self._compute([request], watch)[0]
        except Exception as error:
            return error_response(self._failure(error))

    def _failure(self, error: Exception) -> ApiError:
        """The answer to a single request that failed on the server's side."""
        logger.error("%s: a request failed", self._name, exc_info=error)
        if is_out_of_memory(error):
            self.is_exhausted = True
            return overloaded("the server has no memory left for this")
        if isinstance(error, DecoderError):  # the machine has no room for another process
            return overloaded("the images cannot be decoded at the moment")
        return internal_error()

    def _compute(self, requests: list[Any], watch: Stopwatch) -> list[Response]:
        with watch("compute"):
            computed = self.operation.compute(requests, self.engine)
        with watch("encode"):
            answers = [self._respond(r, c) for r, c in zip(requests, computed, strict=True)]
        # Only after all are answered: those of a failed batch are computed again one by one.
        self.operation.observe(requests, computed, self.telemetry)
        return answers

    def _respond(self, request: Any, computed: Any) -> Response:
        try:
            return self.operation.respond(request, computed, self.engine)
        except ApiError as error:
            return error_response(error)


def _within(room: int, parsed: list[Any]) -> list[Any]:
    """Replace requests whose images are too many for one batch by the error 503."""
    kept = []
    for request in parsed:
        taken = request.pixels if isinstance(request, FilesRequest) else 0
        kept.append(request if taken <= room else _busy())
        room -= taken if taken <= room else 0
    return kept


def _busy() -> ApiError:
    return overloaded("other requests keep the server busy")
