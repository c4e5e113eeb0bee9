"""``encode``: latents of images."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ade_client.contract import (
    ARRAYS,
    EncodeAnswer,
    EncodeParameters,
    EncodeResult,
    Latents,
    Level,
)
from ade_client.model import to_json
from serving.api.operations.base import Format, ImageOperation, split
from serving.api.responses import (
    HEAD_BYTES,
    NPZ_TYPE,
    Response,
    check_size,
    fail_on_error,
    json_response,
    npz_response,
    results_of,
)
from serving.ingest.errors import ApiError, unusable
from serving.ingest.picture import Picture
from serving.ingest.requests import JSON_BYTES_PER_NUMBER, JSON_TYPE, ImagesRequest

if TYPE_CHECKING:
    from serving.engine.bundle import Bundle
    from serving.engine.engine import EncodedLevel, InferenceEngine

MAX_JSON_ENCODINGS = 16


class Encode(ImageOperation[EncodeParameters, "list[EncodedLevel]"]):
    """Latents of images: the posterior's mean and log-scale in each level, and a draw."""

    name = "encode"
    summary = "Latents of images"
    parameters = EncodeParameters
    formats = {"json": Format(JSON_TYPE, EncodeAnswer), "npz": Format(NPZ_TYPE)}
    about_formats = f"of the answer; json has the latents of at most {MAX_JSON_ENCODINGS} images"

    def rows(self, request: ImagesRequest[EncodeParameters]) -> int:
        # The noise of an encoding is computed like a likelihood, in one more row.
        return len(request.images) * (1 + request.parameters.eps)

    def bytes_of_one(self, request: ImagesRequest[EncodeParameters], bundle: Bundle) -> int:
        arrays = len(ARRAYS) - (not request.parameters.eps)
        is_json = request.format == "json"
        number = JSON_BYTES_PER_NUMBER if is_json else np.dtype(np.float32).itemsize
        return arrays * number * sum(map(math.prod, bundle.latent_shapes)) + HEAD_BYTES

    def run(
        self,
        images: Sequence[Picture],
        parameters: Sequence[EncodeParameters],
        engine: InferenceEngine,
    ) -> list[EncodedLevel]:
        return engine.encode(
            np.stack([image.pixels for image in images]),
            [p.seed for p in parameters],
            [p.eps for p in parameters],
        )

    def split(
        self, computed: list[EncodedLevel], counts: Sequence[int]
    ) -> list[list[EncodedLevel]]:
        levels = [
            {
                name: split(getattr(level, name), counts)
                for name in ARRAYS
                if getattr(level, name) is not None
            }
            for level in computed
        ]
        return [
            [
                dataclasses.replace(level, **{name: values[i] for name, values in named.items()})
                for level, named in zip(computed, levels, strict=True)
            ]
            for i in range(len(counts))
        ]

    def respond(
        self,
        request: ImagesRequest[EncodeParameters],
        computed: list[EncodedLevel],
        engine: InferenceEngine,
    ) -> Response:
        images = request.images
        names = ARRAYS if request.parameters.eps else ARRAYS[:-1]
        # A request without usable images has no part in the result, which may lack eps.
        mine = computed if request.usable else []
        levels = [{name: getattr(level, name) for name in names} for level in mine]
        arrays = [array for named in levels for array in named.values()]
        is_finite = (
            np.all([np.isfinite(array).all(axis=(1, 2, 3)) for array in arrays], axis=0)
            if arrays
            else np.empty(0, bool)
        )
        if request.format == "npz":
            fail_on_error(images)
            if not is_finite.all():
                raise _not_finite().at(int(np.argmin(is_finite)))
            check_size(sum(array.nbytes for array in arrays), "send fewer images")
            mean, log_scale, z, eps = (
                [named[name] for named in levels if name in names] for name in ARRAYS
            )
            return npz_response(Latents(mean, log_scale, z, eps).arrays())
        if len(images) > MAX_JSON_ENCODINGS:
            raise unusable(
                "too_many_images",
                f"JSON carries the latents of at most {MAX_JSON_ENCODINGS} images, got "
                f'{len(images)}: ask for "format": "npz"',
            )
        numbers = sum(array.size for array in arrays)
        check_size(JSON_BYTES_PER_NUMBER * numbers, 'ask for "format": "npz"')

        def result(row: int, image: Picture) -> EncodeResult | ApiError:
            if not is_finite[row]:
                return _not_finite()
            return EncodeResult(
                levels=[
                    Level(
                        shape=list(named["z"].shape[1:]),
                        **{name: array[row] for name, array in named.items()},
                    )
                    for named in levels
                ],
                notes=image.notes,
            )

        answer = EncodeAnswer(model=engine.bundle.model_id, results=results_of(images, result))
        return json_response(to_json(answer))


def _not_finite() -> ApiError:
    return unusable("not_finite", "the model's latents of this image are not finite numbers")
