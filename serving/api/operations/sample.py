"""``sample``: new images, or the images of given latents."""

from __future__ import annotations

import dataclasses
import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ade_base.messages import show
from ade_base.pictures.show import tile, write_png
from ade_client.contract import (
    MAX_IMAGES,
    MAX_SEED,
    SEED_HEADER,
    SampleAnswer,
    SampleParameters,
    SampleResult,
)
from ade_client.model import to_json
from serving.api.operations.base import Format, Operation, model_name, split
from serving.api.responses import (
    NPY_TYPE,
    PNG_TYPE,
    Response,
    check_size,
    json_response,
    npy_response,
    picture_bytes,
)
from serving.ingest.errors import ApiError, malformed, unusable
from serving.ingest.requests import (
    JSON_BYTES_PER_NUMBER,
    JSON_TYPE,
    MAX_JSON_VALUES,
    URLENCODED,
    JsonLimits,
    RawRequest,
    array_of,
    form_text,
    is_type,
    json_object,
    parse_json,
)

if TYPE_CHECKING:
    from serving.engine.bundle import Bundle
    from serving.engine.engine import InferenceEngine

MAX_DRAWN_SEED = 2**32  # drawn seeds are short, so that they can be typed
MAX_LATENT = 1000.0  # far beyond any encoding; larger ones would overflow the decoder
MAX_NOISE = 1e6  # an image far from all training images has noise in the thousands
ARRAYS_PER_LEVEL = 4  # of encode's answer, which is accepted unchanged: mean, log_scale, z, eps


@dataclass(frozen=True)
class SampleRequest:
    """A request to draw ``parameters.n`` images, or to decode ``latents``.

    ``latents`` has one array per level, of ``z`` or of the noise ``eps``.
    """

    parameters: SampleParameters
    format: str
    latents: list[np.ndarray] | None = None
    latents_are: str = "z"

    @property
    def count(self) -> int:
        """Number of images to compute."""
        return self.parameters.n


@dataclass(frozen=True)
class Drawn:
    """uint8 images ``(N, H, W, C)``, and the seed that was used."""

    images: np.ndarray
    seed: int


class Sample(Operation[SampleParameters, SampleRequest, Drawn]):
    """New images, or the images of given latents."""

    name = "sample"
    summary = "New images, or the images of given latents"
    parameters = SampleParameters
    formats = {
        "png": Format(PNG_TYPE),
        "npy": Format(NPY_TYPE),
        "json": Format(JSON_TYPE, SampleAnswer),
    }
    about_formats = "of the answer; png is one picture, a grid if n > 1"
    headers = {
        SEED_HEADER: {
            "description": "the seed that was used",
            "schema": {"type": "integer", "format": "int64", "minimum": 0, "maximum": MAX_SEED},
        }
    }

    def parse(self, request: RawRequest, bundle: Bundle) -> SampleRequest:
        parameters, answer_format = self.read(_given(request, bundle.latent_shapes))
        assert answer_format is not None
        latents, are = None, "z"
        if parameters.latents is not None:
            latents, are = _latents(parameters.latents, bundle.latent_shapes)
            parameters = dataclasses.replace(parameters, n=len(latents[0]), latents=None)
        if parameters.index + parameters.n - 1 > MAX_SEED:
            raise unusable(
                "bad_parameter",
                f"index + n - 1 must be at most {MAX_SEED}, got index {parameters.index}, n "
                f"{parameters.n}",
            )
        kind = parameters.kind
        if kind not in bundle.kinds:
            raise unusable(
                "not_available",
                f"{model_name(bundle)} has no {kind} samples: its decoder was trained without a "
                f"likelihood and has no noise; it has {', '.join(bundle.kinds)}",
            )
        return SampleRequest(parameters, answer_format, latents, are)

    def images_of(self, request: SampleRequest) -> int:
        return request.count

    def bytes_of_one(self, request: SampleRequest, bundle: Bundle) -> int:
        return picture_bytes(bundle.image_shape)

    def compute(self, requests: Sequence[SampleRequest], engine: InferenceEngine) -> list[Drawn]:
        given = [request.parameters.seed for request in requests]
        seeds = [secrets.randbelow(MAX_DRAWN_SEED) if s is None else s for s in given]
        fresh = [
            (r.parameters, s) for r, s in zip(requests, seeds, strict=True) if r.latents is None
        ]
        made = iter(())
        if fresh:
            images = engine.sample(
                seeds=[seed for p, seed in fresh for _ in range(p.n)],
                indices=[p.index + i for p, _ in fresh for i in range(p.n)],
                kinds=[p.kind for p, _ in fresh for _ in range(p.n)],
                temperatures=[p.temperature for p, _ in fresh for _ in range(p.n)],
            )
            made = iter(split(images, [p.n for p, _ in fresh]))
        drawn = []
        for request, seed in zip(requests, seeds, strict=True):
            if request.latents is None:
                images = next(made)
            else:
                decode = engine.decode if request.latents_are == "z" else engine.sample_with
                n, kind = request.parameters.n, request.parameters.kind
                images = decode(request.latents, [seed] * n, [kind] * n)
            drawn.append(Drawn(images, seed))
        return drawn

    def respond(self, request: SampleRequest, computed: Drawn, engine: InferenceEngine) -> Response:
        images, parameters = computed.images, request.parameters
        model_id = engine.bundle.model_id
        check_size(2 * images.nbytes, "ask for fewer images")

        def text(index: int, n: int) -> dict[str, str]:
            made = {
                "ade:seed": str(computed.seed),
                "ade:kind": parameters.kind,
                "ade:model": model_id,
            }
            if request.latents is not None:
                return {**made, "ade:from": "latents"}
            drawn = {
                "ade:index": str(index),
                "ade:n": str(n),
                "ade:temperature": repr(parameters.temperature),
            }
            return {**made, **drawn}

        if request.format == "npy":
            response = npy_response(images)
        elif request.format == "png":
            grid = write_png(tile(images), text(parameters.index, len(images)))
            response = Response(200, PNG_TYPE, grid)
        else:
            answer = SampleAnswer(
                model=model_id,
                kind=parameters.kind,
                seed=computed.seed,
                temperature=parameters.temperature,
                results=[
                    SampleResult(
                        image=write_png(image, text(index, 1)), seed=computed.seed, index=index
                    )
                    for index, image in enumerate(images, parameters.index)
                ],
            )
            response = json_response(to_json(answer))
        response.headers[SEED_HEADER] = str(computed.seed)
        return response


def json_limits(latent_shapes: Sequence[tuple[int, int, int]]) -> JsonLimits:
    """Limits of a request's JSON, which may hold the latents of the most images."""
    arrays = MAX_IMAGES * ARRAYS_PER_LEVEL
    numbers = arrays * sum(map(math.prod, latent_shapes))
    return JsonLimits(
        2**20 + JSON_BYTES_PER_NUMBER * numbers,
        MAX_JSON_VALUES + arrays * sum(2 + c + c * h for c, h, _ in latent_shapes),
        2 * MAX_JSON_VALUES + numbers,
    )


def _given(request: RawRequest, latent_shapes: list[tuple[int, int, int]]) -> dict[str, Any]:
    """The values of a request, which may be JSON or a form."""
    limits = json_limits(latent_shapes)
    if request.body is None:
        # The server drops fields without a name, which a JSON body without its type becomes.
        if not request.fields and is_type(request.content_type, URLENCODED):
            raise malformed(
                "the form is empty: a JSON body needs the header Content-Type: application/json"
            )
        given: dict[str, Any] = {n: form_text(n, value) for n, value in request.fields.items()}
        if "latents" in given:
            given["latents"] = parse_json(given["latents"], "latents", limits)
        return given
    if is_type(request.content_type, JSON_TYPE) or isinstance(request.body, dict):
        return json_object(request, limits)
    if isinstance(request.body, (bytes, bytearray, str)) and not request.body:
        raise malformed('the request is empty: POST a JSON object, such as {"n": 4, "seed": 7}')
    raise malformed(
        "sample takes parameters as JSON (Content-Type: application/json) or as a form, "
        f"got {request.content_type or 'no content type'}"
    )


def _latents(value: Any, shapes: list[tuple[int, int, int]]) -> tuple[list[np.ndarray], str]:
    """Read latents in the structure of ``encode``'s answer.

    There is one entry per image, ``{"levels": [{"z": ...}, ...]}`` or a bare list of levels.
    Instead of ``z`` there may be ``eps``, in all levels of all images. ``value`` may also be the
    whole answer, or one of its entries.

    Returns:
        One array per level, and which of the two they are.
    """
    if isinstance(value, dict):
        value = value.get("results", [value])
    if not isinstance(value, list) or not value:
        raise unusable(
            "bad_latents",
            "latents must be a list with an entry for each image, as in an answer of encode",
        )
    if len(value) > MAX_IMAGES:
        raise ApiError(
            413,
            "too_many_images",
            f"at most {MAX_IMAGES} images per request, got latents of {len(value)}",
        )
    levels: list[list[np.ndarray]] = [[] for _ in shapes]
    are, limit = _which(value)
    for i, entry in enumerate(value):
        given = entry.get("levels") if isinstance(entry, dict) else entry
        if not isinstance(given, list) or len(given) != len(shapes):
            raise unusable(
                "bad_latents",
                f"latents must have {len(shapes)} levels per image, got "
                f"{len(given) if isinstance(given, list) else show(given)}",
            ).at(i)
        for level, (item, shape) in enumerate(zip(given, shapes, strict=True)):
            try:
                with np.errstate(over="ignore"):  # numbers that become infinite are refused below
                    numbers = array_of(item.get(are) if isinstance(item, dict) else item)
                    if numbers.dtype.kind not in "iuf":
                        raise TypeError
                    array = numbers.astype(np.float32)
            except (ValueError, TypeError, OverflowError):
                raise unusable(
                    "bad_latents", f"{are} of level {level} must be numbers of shape {shape}"
                ).at(i) from None
            if array.shape != shape:
                raise unusable(
                    "bad_latents",
                    f"{are} of level {level} must have shape {shape}, got {array.shape}",
                ).at(i)
            if not (np.abs(array) <= limit).all():
                raise unusable(
                    "bad_latents",
                    f"{are} of level {level} must be finite numbers of at most {limit:g}",
                ).at(i)
            levels[level].append(array)
    return [np.stack(level) for level in levels], are


def _which(entries: list[Any]) -> tuple[str, float]:
    """Find out whether latents are ``z`` or ``eps``; the number is the largest absolute value."""
    levels = [entry.get("levels") if isinstance(entry, dict) else entry for entry in entries]
    items = [item for its in levels if isinstance(its, list) for item in its]
    named = [item for item in items if isinstance(item, dict)]
    if named and not all("z" in item for item in named) and any("eps" in item for item in named):
        if len(named) < len(items) or not all("eps" in item for item in named):
            raise unusable(
                "bad_latents", "latents must have z in all levels of all images, or eps in all"
            )
        return "eps", MAX_NOISE
    return "z", MAX_LATENT
