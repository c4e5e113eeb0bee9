"""A batch of requests to a batch of answers: parse, compute together, answer apart.

This is all that an HTTP server has to call. Whatever is wrong with one request, the others get
their normal answers.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from serving.api.errors import ApiError, is_out_of_memory, unusable
from serving.api.journal import Journal
from serving.api.requests import (
    MAX_REQUEST_PIXELS,
    Each,
    FilesRequest,
    ImagesRequest,
    InputImage,
    RawRequest,
    SampleRequest,
    decode_images,
    parse_images,
    parse_sample,
)
from serving.api.responses import (
    MAX_ANSWER_BYTES,
    Response,
    encode_response,
    error_response,
    expected_bytes,
    reconstruct_response,
    sample_response,
    score_response,
)
from serving.api.telemetry import Stopwatch, Telemetry
from serving.engine.engine import EncodedLevel, InferenceEngine, Score

logger = logging.getLogger(__name__)
MAX_DRAWN_SEED = 2**32  # drawn seeds are short enough to type
# What one batch of requests may take, well within what the server allows a worker; each request by
# itself takes less.
MAX_BATCH_PIXELS = 4 * MAX_REQUEST_PIXELS  # of pictures, before resizing
MAX_BATCH_BYTES = MAX_ANSWER_BYTES  # of all answers: the server takes them in one piece
MAX_BATCH_S = 20.0  # from when on nothing more is begun
PASS_ROWS = 256  # of a graph, computed between two looks at the clock


class Service:
    """One operation of one bundle.

    Args:
        operation: ``sample``, ``encode``, ``reconstruct`` or ``score``.
        engine: has the operation's graphs loaded.
        threads: to decode pictures with.
        journal: where requests are logged.

    Attributes:
        is_exhausted: a request by itself did not fit into memory: better start anew.
    """

    def __init__(
        self,
        operation: str,
        engine: InferenceEngine,
        threads: int = 1,
        journal: Journal | None = None,
    ) -> None:
        self.operation = operation
        self.engine = engine
        self._model_id = engine.bundle.model_id
        self.telemetry = Telemetry(self._model_id, engine.backend.name)
        self.is_exhausted = False
        self._journal = journal
        self._each: Each = ThreadPoolExecutor(threads, "decode").map if threads > 1 else map
        self._model_name = f"{engine.bundle.name} ({engine.bundle.manifest['recipe']})"

    def answer(self, requests: Sequence[RawRequest]) -> list[Response]:
        """One answer a request, in order; never raises for what a client sent."""
        watch = Stopwatch()
        deadline = time.monotonic() + MAX_BATCH_S
        with watch("parse"):
            taken_apart = [self._parse(request) for request in requests]
        with watch("decode"):
            parsed = self._decode(_within(MAX_BATCH_PIXELS, taken_apart))
        answers, count = self._in_passes(parsed, deadline, watch)
        stages = ", ".join(
            f"{stage};dur={1000 * seconds:.2f}" for stage, seconds in watch.seconds.items()
        )
        for answer in answers:
            answer.headers.update(
                {
                    "X-Ade-Model": self._model_id,
                    "X-Ade-Backend": self.engine.backend.name,
                    "X-Ade-Batch": str(count),
                    "Server-Timing": stages,
                }
            )
        self._report(requests, answers, count, watch)
        return answers

    def _in_passes(
        self,
        parsed: list[SampleRequest | ImagesRequest | ApiError],
        deadline: float,
        watch: Stopwatch,
    ) -> tuple[list[Response], int]:
        """Compute in passes for as long as there is time and room for answers; those left over are
        asked to come again.

        The first pass is always computed, so that a request by itself always is.

        Returns:
            The answers, and how many images were computed.
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
                answers |= {i: error_response(_overloaded()) for i in waiting}
                break
            requests = [waiting.pop(i) for i in chosen]
            for i, answer in zip(chosen, self._together(requests, watch), strict=True):
                answers[i] = answer
                room -= len(answer.body)
            count += sum(self._count(request) for request in requests)
        return [answers[i] for i in range(len(parsed))], count

    def _next_pass(
        self, waiting: dict[int, SampleRequest | ImagesRequest], room: int, is_first: bool
    ) -> list[int]:
        """Which requests to compute together: the first ones whose answers have room."""
        chosen: list[int] = []
        rows = 0
        for i, request in waiting.items():
            size = expected_bytes(
                self.operation, request, self.engine.image_shape, self.engine.latent_shapes
            )
            if size > room and (chosen or not is_first):
                continue  # there may be room once the others' answers are there, which are shorter than expected
            if chosen and rows + _rows(request) > PASS_ROWS:
                break
            chosen.append(i)
            rows += _rows(request)
            room -= size
        return chosen

    def _together(self, requests: list[Any], watch: Stopwatch) -> list[Response]:
        try:
            return self._compute(requests, watch)
        except Exception:  # one request must not take its neighbours down: compute each by itself
            logger.exception("%s: a batch of %d requests failed", self.operation, len(requests))
            return [self._alone(request, watch) for request in requests]

    def _report(
        self, requests: Sequence[RawRequest], answers: list[Response], count: int, watch: Stopwatch
    ) -> None:
        """To metrics and log; probes are no traffic."""
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
                "operation": self.operation,
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

    def _parse(self, request: RawRequest) -> SampleRequest | FilesRequest | ApiError:
        bundle = self.engine.bundle
        try:
            if self.operation not in bundle.operations:
                raise unusable(
                    "not_available",
                    f"{self._model_name} has no {self.operation}: it was trained without an "
                    "inference network and can only sample",
                )
            if self.operation == "sample":
                sample = parse_sample(request, self.engine.latent_shapes)
                self._check_kind(sample.kind)
                return sample
            return parse_images(self.operation, request)
        except ApiError as error:
            return error
        except Exception:
            logger.exception("%s: a request could not be parsed", self.operation)
            return _internal_error()

    def _decode(
        self, parsed: list[SampleRequest | FilesRequest | ApiError]
    ) -> list[SampleRequest | ImagesRequest | ApiError]:
        """The same with pictures decoded."""
        files = [p for p in parsed if isinstance(p, FilesRequest)]
        decoded: Iterator[ImagesRequest | ApiError]
        try:
            decoded = iter(decode_images(files, self.engine.image_shape, self._each))
        except Exception:  # as with computing: find the one at fault
            logger.exception(
                "%s: pictures of %d requests could not be decoded", self.operation, len(files)
            )
            decoded = iter([self._decode_alone(f) for f in files])
        return [next(decoded) if isinstance(p, FilesRequest) else p for p in parsed]

    def _decode_alone(self, files: FilesRequest) -> ImagesRequest | ApiError:
        try:
            return decode_images([files], self.engine.image_shape)[0]
        except Exception as error:
            return self._failure(error)

    def _check_kind(self, kind: str) -> None:
        kinds = self.engine.bundle.kinds
        if kind not in kinds:
            raise unusable(
                "not_available",
                f"{self._model_name} has no {kind} samples: its decoder was trained without a "
                f"likelihood and has no noise; it has {', '.join(kinds)}",
            )

    def _alone(self, request: Any, watch: Stopwatch) -> Response:
        try:
            return self._compute([request], watch)[0]
        except Exception as error:
            return error_response(self._failure(error))

    def _failure(self, error: Exception) -> ApiError:
        """Of a request by itself, and not its own fault."""
        logger.error("%s: a request failed", self.operation, exc_info=error)
        if is_out_of_memory(error):
            self.is_exhausted = True
            return ApiError(
                503, "overloaded", "the server has no memory left for this: try again later"
            )
        return _internal_error()

    def _compute(self, requests: list[Any], watch: Stopwatch) -> list[Response]:
        if not requests:
            return []
        return (
            self._sample(requests, watch)
            if self.operation == "sample"
            else self._images(requests, watch)
        )

    def _sample(self, requests: list[SampleRequest], watch: Stopwatch) -> list[Response]:
        used = [secrets.randbelow(MAX_DRAWN_SEED) if r.seed is None else r.seed for r in requests]
        fresh = [(r, seed) for r, seed in zip(requests, used, strict=True) if r.latents is None]
        made = iter(())
        if fresh:
            with watch("compute"):
                images = self.engine.sample(
                    seeds=[seed for r, seed in fresh for _ in range(r.n)],
                    indices=[r.index + i for r, _ in fresh for i in range(r.n)],
                    kinds=[r.kind for r, _ in fresh for _ in range(r.n)],
                    temperatures=[r.temperature for r, _ in fresh for _ in range(r.n)],
                )
            made = iter(_split(images, [r.n for r, _ in fresh]))
        answers = []
        for r, seed in zip(requests, used, strict=True):
            if r.latents is None:
                images = next(made)
            else:
                with watch("compute"):
                    make = self.engine.decode if r.latents_are == "z" else self.engine.sample_with
                    images = make(r.latents, [seed] * r.n, [r.kind] * r.n)
            with watch("encode"):
                answers.append(_guarded(sample_response, images, r, seed, self._model_id))
        return answers

    def _images(self, requests: list[ImagesRequest], watch: Stopwatch) -> list[Response]:
        usable = [[image for image in r.images if isinstance(image, InputImage)] for r in requests]
        counts = [len(images) for images in usable]

        def each(name: str) -> list[Any]:
            return [
                r.parameters[name] for r, n in zip(requests, counts, strict=True) for _ in range(n)
            ]

        pixels = [image.pixels for images in usable for image in images]
        with watch("compute"):
            resized = [image.resized for images in usable for image in images]
            computed = self._run(np.stack(pixels), resized, each) if pixels else []
        with watch("encode"):
            answers = [
                _guarded(self._image_response, r, mine)
                for r, mine in zip(requests, self._shares(computed, counts), strict=True)
            ]
        if (
            self.operation == "score"
        ):  # once all is answered: a batch that fails is computed again, request by request
            self.telemetry.observe_scores(
                (score, r.parameters["alpha"])
                for r, mine in zip(requests, _split(computed, counts), strict=True)
                if not r.probe
                for score in mine
                if isinstance(score, Score)
            )
        return answers

    def _run(self, batch: np.ndarray, resized: list[bool], each: Callable[[str], list[Any]]) -> Any:
        """Compute the batch with the parameters of each image."""
        if self.operation == "encode":
            return self.engine.encode(batch, each("seed"), each("eps"))
        if self.operation == "reconstruct":
            return self.engine.reconstruct(batch, each("seed"), each("kind"))
        return self.engine.score(batch, each("seed"), each("samples"), each("map"), resized)

    def _shares(self, computed: Any, counts: list[int]) -> list[Any]:
        """What was computed, apart by request."""
        if self.operation != "encode":
            return _split(computed, counts)
        levels = [
            list(
                zip(
                    *(
                        _split(values, counts)
                        for values in (level.mean, level.log_scale, level.z, level.eps)
                        if values is not None
                    ),
                    strict=True,
                )
            )
            for level in computed
        ]
        return [[EncodedLevel(*level[i]) for level in levels] for i in range(len(counts))]

    def _image_response(self, request: ImagesRequest, mine: Any) -> Response:
        parameters = request.parameters
        if self.operation == "encode":
            return encode_response(
                request.images, mine, parameters["format"], parameters["eps"], self._model_id
            )
        if self.operation == "reconstruct":
            return reconstruct_response(
                request.images, mine, parameters["format"], parameters["kind"], self._model_id
            )
        return score_response(
            request.images, mine, parameters, self.engine.calibrations, self._model_id
        )

    @staticmethod
    def _count(request: SampleRequest | ImagesRequest) -> int:
        if isinstance(request, SampleRequest):
            return request.n
        return sum(isinstance(image, InputImage) for image in request.images)


def _within(room: int, parsed: list[Any]) -> list[Any]:
    """Requests, but for those whose pictures would be too many for one batch: they are asked to
    come again.
    """
    kept = []
    for request in parsed:
        taken = request.pixels if isinstance(request, FilesRequest) else 0
        kept.append(request if taken <= room else _overloaded())
        room -= taken if taken <= room else 0
    return kept


def _rows(request: SampleRequest | ImagesRequest) -> int:
    """Of a graph. The noise of an encoding is computed as a likelihood is: a row more."""
    if isinstance(request, SampleRequest):
        return request.n
    return len(request.images) * (
        request.parameters.get("samples", 1) + request.parameters.get("eps", False)
    )


def _split(values: Any, counts: list[int]) -> list[Any]:
    out = []
    first = 0
    for n in counts:
        out.append(values[first : first + n])
        first += n
    return out


def _guarded(make: Any, *args: Any) -> Response:
    """An answer, or the error that making it found."""
    try:
        response: Response = make(*args)
        return response
    except ApiError as error:
        return error_response(error)


def _overloaded() -> ApiError:
    return ApiError(503, "overloaded", "other requests keep the server busy: try again later")


def _internal_error() -> ApiError:
    return ApiError(500, "internal_error", "the server failed on this request; its log says why")
