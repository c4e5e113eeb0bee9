"""A batch of requests to a batch of answers: parse, compute together, answer apart.

This is all that an HTTP server has to call. Whatever is wrong with one request, the others get their normal answers.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np

from serving.engine import InferenceEngine, Score
from serving.errors import ApiError, unusable
from serving.requests import ImagesRequest, InputImage, RawRequest, SampleRequest, parse_images, parse_sample
from serving.responses import (
    Response,
    encode_response,
    error_response,
    reconstruct_response,
    sample_response,
    score_response,
)
from serving.telemetry import ScoreTelemetry

logger = logging.getLogger(__name__)
MAX_DRAWN_SEED = 2**32  # drawn seeds are short enough to type
# Rows of a graph that one batch of requests may take, well within the server's patience with a worker; each request by
# itself takes fewer.
MAX_BATCH_ROWS = 8192


class Service:
    """One operation of one bundle.

    Args:
        operation: ``sample``, ``encode``, ``reconstruct`` or ``score``.
        engine: has the operation's graphs loaded.
    """

    def __init__(self, operation: str, engine: InferenceEngine) -> None:
        self.operation = operation
        self.engine = engine
        self.telemetry = ScoreTelemetry()
        self._model_id = engine.bundle.model_id
        self._judges_resized = engine.calibration is not None and engine.calibration.resize == "fit"
        self._model_name = f"{engine.bundle.name} ({engine.bundle.manifest['recipe']})"

    def answer(self, requests: Sequence[RawRequest]) -> list[Response]:
        """One answer a request, in order; never raises for what a client sent."""
        parsed = self._within_reach([self._parse(request) for request in requests])
        good = [p for p in parsed if not isinstance(p, ApiError)]
        try:
            computed = iter(self._compute(good))
        except Exception:  # one request must not take its neighbours down: compute each by itself
            logger.exception("%s: a batch of %d requests failed", self.operation, len(good))
            computed = iter([self._alone(p) for p in good])
        count = sum(self._count(p) for p in good)
        answers = []
        for p in parsed:
            answer = error_response(p) if isinstance(p, ApiError) else next(computed)
            answer.headers.update({"X-Ade-Model": self._model_id, "X-Ade-Backend": self.engine.backend.name,
                                   "X-Ade-Batch": str(count)})
            answers.append(answer)
        return answers

    def _parse(self, request: RawRequest) -> SampleRequest | ImagesRequest | ApiError:
        bundle = self.engine.bundle
        try:
            if self.operation not in bundle.operations:
                raise unusable("not_available", f"{self._model_name} has no {self.operation}: it was trained without an "
                                                "inference network and can only sample")
            if self.operation == "sample":
                sample = parse_sample(request, self.engine.latent_shapes)
                self._check_kind(sample.kind)
                return sample
            return parse_images(self.operation, request, self.engine.image_shape)
        except ApiError as error:
            return error
        except Exception:
            logger.exception("%s: a request could not be parsed", self.operation)
            return _internal_error()

    @staticmethod
    def _within_reach(parsed: list[SampleRequest | ImagesRequest | ApiError]) -> list[
            SampleRequest | ImagesRequest | ApiError]:
        """The same, but for requests that would make the batch too long: they are asked to come again."""
        room = MAX_BATCH_ROWS
        kept: list[SampleRequest | ImagesRequest | ApiError] = []
        for request in parsed:
            rows = 0
            if isinstance(request, SampleRequest):
                rows = request.n
            elif isinstance(request, ImagesRequest):
                rows = len(request.images) * request.parameters.get("samples", 1)
            if rows > room:
                kept.append(ApiError(503, "overloaded", "other requests keep the server busy: try again later"))
                continue
            room -= rows
            kept.append(request)
        return kept

    def _check_kind(self, kind: str) -> None:
        kinds = self.engine.bundle.kinds
        if kind not in kinds:
            raise unusable("not_available", f"{self._model_name} has no {kind} samples: its decoder was trained without a "
                                            f"likelihood and has no noise; it has {', '.join(kinds)}")

    def _alone(self, request: Any) -> Response:
        try:
            return self._compute([request])[0]
        except Exception:
            logger.exception("%s: a request failed", self.operation)
            return error_response(_internal_error())

    def _compute(self, requests: list[Any]) -> list[Response]:
        if not requests:
            return []
        return self._sample(requests) if self.operation == "sample" else self._images(requests)

    def _sample(self, requests: list[SampleRequest]) -> list[Response]:
        used = [secrets.randbelow(MAX_DRAWN_SEED) if r.seed is None else r.seed for r in requests]
        fresh = [(r, seed) for r, seed in zip(requests, used, strict=True) if r.latents is None]
        made = iter(())
        if fresh:
            images = self.engine.sample(
                seeds=[seed for r, seed in fresh for _ in range(r.n)],
                indices=[r.index + i for r, _ in fresh for i in range(r.n)],
                kinds=[r.kind for r, _ in fresh for _ in range(r.n)],
                temperatures=[r.temperature for r, _ in fresh for _ in range(r.n)])
            made = iter(_split(images, [r.n for r, _ in fresh]))
        answers = []
        for r, seed in zip(requests, used, strict=True):
            images = next(made) if r.latents is None else self.engine.decode(r.latents, [seed] * r.n, [r.kind] * r.n)
            answers.append(_guarded(sample_response, images, r, seed, self._model_id))
        return answers

    def _images(self, requests: list[ImagesRequest]) -> list[Response]:
        usable = [[image for image in r.images if isinstance(image, InputImage)] for r in requests]
        counts = [len(images) for images in usable]

        def each(name: str) -> list[Any]:
            return [r.parameters[name] for r, n in zip(requests, counts, strict=True) for _ in range(n)]

        pixels = [image.pixels for images in usable for image in images]
        batch = np.stack(pixels) if pixels else np.empty((0, *self.engine.image_shape), np.uint8)
        answers = []
        seen: list[tuple[Score, bool]] = []
        if self.operation == "encode":
            levels = self.engine.encode(batch, each("seed")) if pixels else []
            first = 0
            for r, n in zip(requests, counts, strict=True):
                mine = [type(level)(level.mean[first:first + n], level.log_scale[first:first + n],
                                    level.z[first:first + n]) for level in levels]
                first += n
                answers.append(_guarded(encode_response, r.images, mine, r.parameters["format"], self._model_id))
        elif self.operation == "reconstruct":
            made = self.engine.reconstruct(batch, each("seed"), each("kind")) if pixels else batch
            for r, mine in zip(requests, _split(made, counts), strict=True):
                answers.append(_guarded(reconstruct_response, r.images, mine, r.parameters["format"],
                                        r.parameters["kind"], self._model_id))
        else:
            scores = self.engine.score(batch, each("seed"), each("samples"), each("map")) if pixels else []
            for r, mine, images in zip(requests, _split(scores, counts), usable, strict=True):
                if not r.probe:
                    seen += [(score, self._judges_resized or not image.resized)
                             for score, image in zip(mine, images, strict=True) if isinstance(score, Score)]
                answers.append(_guarded(score_response, r.images, mine, r.parameters, self._judges_resized, self._model_id))
        self.telemetry.observe(seen)  # once all is answered: a batch that fails is computed again, request by request
        return answers

    @staticmethod
    def _count(request: SampleRequest | ImagesRequest) -> int:
        if isinstance(request, SampleRequest):
            return request.n
        return sum(isinstance(image, InputImage) for image in request.images)


def _split(values: Any, counts: list[int]) -> list[Any]:
    out = []
    first = 0
    for n in counts:
        out.append(values[first:first + n])
        first += n
    return out


def _guarded(make: Any, *args: Any) -> Response:
    """An answer, or the error that making it found."""
    try:
        response: Response = make(*args)
        return response
    except ApiError as error:
        return error_response(error)


def _internal_error() -> ApiError:
    return ApiError(500, "internal_error", "the server failed on this request; its log says why")
