"""``reconstruct``: images encoded and decoded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ade_base.pictures.show import psnr, write_png
from ade_client.contract import (
    ReconstructAnswer,
    Reconstruction,
    ReconstructParameters,
)
from ade_client.model import to_json
from serving.api.operations.base import Format, ImageOperation
from serving.api.responses import (
    NPY_TYPE,
    PNG_TYPE,
    Response,
    check_size,
    fail_on_error,
    json_response,
    npy_response,
    picture_bytes,
    results_of,
)
from serving.ingest.errors import unusable
from serving.ingest.picture import Picture
from serving.ingest.requests import JSON_TYPE, ImagesRequest

if TYPE_CHECKING:
    from serving.engine.bundle import Bundle
    from serving.engine.engine import InferenceEngine


class Reconstruct(ImageOperation[ReconstructParameters, np.ndarray]):
    """Images encoded and decoded, with their PSNR."""

    name = "reconstruct"
    summary = "Images encoded and decoded, with their PSNR"
    parameters = ReconstructParameters
    formats = {
        "png": Format(PNG_TYPE),
        "npy": Format(NPY_TYPE),
        "json": Format(JSON_TYPE, ReconstructAnswer),
    }
    about_formats = "of the answer: png for one image and json for several unless given"
    headers = {
        "X-Ade-Psnr": {
            "description": "of each image, decibels, unless the answer is JSON",
            "schema": {"type": "string"},
        }
    }

    @property
    def default_format(self) -> None:
        return None

    def bytes_of_one(self, request: ImagesRequest[ReconstructParameters], bundle: Bundle) -> int:
        return picture_bytes(bundle.image_shape)

    def run(
        self,
        images: Sequence[Picture],
        parameters: Sequence[ReconstructParameters],
        engine: InferenceEngine,
    ) -> np.ndarray:
        return engine.reconstruct(
            np.stack([image.pixels for image in images]),
            [p.seed for p in parameters],
            [p.kind for p in parameters],
        )

    def respond(
        self,
        request: ImagesRequest[ReconstructParameters],
        computed: np.ndarray,
        engine: InferenceEngine,
    ) -> Response:
        images, kind, model_id = request.images, request.parameters.kind, engine.bundle.model_id
        check_size(2 * sum(image.nbytes for image in computed), "send fewer images")
        found = [
            psnr(image.pixels, made) for image, made in zip(request.usable, computed, strict=True)
        ]
        decibels = [math.inf if value is None else value for value in found]
        text = {"ade:kind": kind, "ade:model": model_id}

        def result(row: int, image: Picture) -> Reconstruction:
            return Reconstruction(
                png=write_png(computed[row], text), psnr=decibels[row], notes=image.notes
            )

        answer_format = request.format or ("png" if len(images) == 1 else "json")
        if answer_format == "json":
            results = results_of(images, result)
            answer = ReconstructAnswer(model=model_id, kind=kind, results=results)
            return json_response(to_json(answer))
        fail_on_error(images)
        if answer_format == "npy":
            response = npy_response(computed)
        elif len(images) > 1:
            raise unusable(
                "too_many_images",
                f"a PNG carries one reconstruction, got {len(images)} images: ask for "
                '"format": "npy" or "json"',
            )
        else:
            response = Response(200, PNG_TYPE, write_png(computed[0], text))
        response.headers["X-Ade-Psnr"] = ",".join(f"{value:.4f}" for value in decibels)
        return response
