"""The request's side of the wire contract: what came over HTTP to what the engine takes. No server
in it.

A request is parsed whole or refused whole, except for its images: one that cannot be used becomes
an :class:`ApiError` in its place, and its neighbours go on.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
from PIL import Image

from serving.api.errors import ApiError, malformed, unusable
from serving.api.parameters import MAX_IMAGES, read_parameters
from serving.engine.noise import MAX_SEED
from serving.images import ImageError, header_pixels, read_image, resize_centre
from serving.messages import show, words_of

PROBE_HEADER = "X-Ade-Probe"
MAX_DRAWS = 1024
MAX_BODY_BYTES = 16 * 2**20
MAX_JSON_BYTES = 24 * 2**20  # of images: 16 MiB of files are 22 in base64
MAX_JSON_VALUES = 100_000  # beside the numbers of latents; far more than images and parameters are
JSON_BYTES_A_NUMBER = 26  # at most, with what stands between two
ARRAYS_A_LEVEL = 4  # of encode's answer, which is taken as it is: mean, log_scale, z, eps
MAX_SUFFIX = 4  # digits of a form's field such as image12
MAX_REQUEST_PIXELS = 64_000_000  # before resizing; a second or two to decode
MAX_JSON_ENCODINGS = 16
MAX_LATENT = 1000.0  # far beyond any encoding; larger ones would overflow the decoder
URLENCODED = "application/x-www-form-urlencoded"
MAX_NOISE = 1e6  # an image far from all training images has noise in the thousands
Each = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]


@dataclass(frozen=True)
class RawRequest:
    """A request as the server hands it over.

    Attributes:
        content_type: of the body, as sent.
        body: bytes, text, or what a JSON body was parsed to; ``None`` for a form.
        fields: of a form, values as bytes or text.
        probe: whether somebody only asks if the service answers (header :data:`PROBE_HEADER`): it
            is no traffic.
        id: names it in logs.
    """

    content_type: str
    body: Any
    fields: Mapping[str, Any] = field(default_factory=dict)
    probe: bool = False
    id: str = ""


@dataclass(frozen=True)
class InputImage:
    """One usable image: uint8 ``(H, W, C)`` of the model's shape, and what was done to the file."""

    pixels: np.ndarray
    notes: list[str]
    resized: bool = False


@dataclass(frozen=True)
class SampleRequest:
    """``n`` images from ``index`` on, or those of ``latents``: one array a level, of ``z`` or of
    the noise ``eps``.
    """

    n: int
    seed: int | None
    index: int
    temperature: float
    kind: str
    format: str
    latents: list[np.ndarray] | None
    latents_are: str


@dataclass(frozen=True)
class FilesRequest:
    """Images as they came: files, pixels, or the error of one; the other fields as in
    :class:`ImagesRequest`.
    """

    sources: list[bytes | np.ndarray | ApiError]
    parameters: dict[str, Any]
    fit: bool
    probe: bool = False
    pixels: int = 0  # to decode and resize


@dataclass(frozen=True)
class ImagesRequest:
    """Images, each usable or its error, and parameters by name; ``probe`` as in
    :class:`RawRequest`.
    """

    images: list[InputImage | ApiError]
    parameters: dict[str, Any]
    probe: bool = False


def _is(content_type: str, *kinds: str) -> bool:
    return content_type.split(";")[0].strip().lower() in kinds


def _bytes(value: Any) -> bytes:
    if isinstance(value, str):
        return value.encode()
    if not isinstance(
        value, (bytes, bytearray, memoryview)
    ):  # a part typed as JSON, which the server has parsed
        raise malformed(f"a part of the form must be text or a file, got {type(value).__name__}")
    return bytes(value)


def _parsed(
    text: bytes | bytearray | memoryview | str, name: str, limit: int, lists: int, values: int
) -> Any:
    """JSON whose bytes, lists and values are counted before it is parsed: these take many times the
    room of their text.
    """
    if len(text) > limit:
        raise ApiError(
            413, "request_too_large", f"JSON may have {limit} bytes here, {name} has {len(text)}"
        )
    data = _bytes(text)
    for what, most, count in (
        ("lists and objects", lists, data.count(b"[") + data.count(b"{")),
        ("values", values, data.count(b",")),
    ):
        if count > most:
            raise ApiError(
                413, "request_too_large", f"JSON may have {most} {what} here, {name} has {count}"
            )
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise malformed(f"{name} is not JSON: {error}") from None


def _json_object(
    request: RawRequest, limit: int, lists: int = MAX_JSON_VALUES, values: int = MAX_JSON_VALUES
) -> dict[str, Any]:
    """The JSON object of a request, however far the server parsed it."""
    body = request.body
    if isinstance(body, (bytes, bytearray, memoryview, str)):
        body = _parsed(body, "the body", limit, lists, values)
    if not isinstance(body, dict):
        raise malformed(f"the body must be a JSON object, got {type(body).__name__}")
    return body


def parse_sample(request: RawRequest, latent_shapes: list[tuple[int, int, int]]) -> SampleRequest:
    """Take a ``sample`` request apart.

    Args:
        request: JSON, or a form.
        latent_shapes: what ``latents`` must have.

    Raises:
        ApiError: with the status to answer.
    """
    arrays = MAX_IMAGES * ARRAYS_A_LEVEL
    numbers = arrays * sum(map(math.prod, latent_shapes))
    limits = (
        2**20 + JSON_BYTES_A_NUMBER * numbers,
        MAX_JSON_VALUES + arrays * sum(2 + c + c * h for c, h, _ in latent_shapes),
        2 * MAX_JSON_VALUES + numbers,
    )
    if request.body is None:
        if not request.fields and _is(
            request.content_type, URLENCODED
        ):  # the server drops what has no name
            raise malformed(
                "the form is empty: a JSON body needs the header Content-Type: application/json"
            )
        given = {name: _text(name, value) for name, value in request.fields.items()}
        if "latents" in given:
            given["latents"] = _parsed(given["latents"], "latents", *limits)
    elif _is(request.content_type, "application/json") or isinstance(request.body, dict):
        given = _json_object(request, *limits)
    elif isinstance(request.body, (bytes, bytearray, str)) and not request.body:
        raise malformed('the request is empty: POST a JSON object, such as {"n": 4, "seed": 7}')
    else:
        raise malformed(
            "sample takes parameters as JSON (Content-Type: application/json) or as a form, "
            f"got {request.content_type or 'no content type'}"
        )
    values = read_parameters("sample", given)
    latents, are = None, "z"
    if values["latents"] is not None:
        if given.get("n") is not None:
            raise unusable(
                "bad_parameter",
                "n and latents exclude each other: there are as many images as latents",
            )
        for name in ("temperature", "index"):
            if given.get(name) is not None:
                raise unusable(
                    "bad_parameter",
                    f"{name} and latents exclude each other: it is of noise that is drawn",
                )
        latents, are = _latents(values["latents"], latent_shapes)
        values["n"] = len(latents[0])
    if values["index"] + values["n"] - 1 > MAX_SEED:
        raise unusable(
            "bad_parameter",
            f"index + n must be at most {MAX_SEED}, got {values['index']} + {values['n']}",
        )
    values["latents"] = latents
    return SampleRequest(**values, latents_are=are)


def _text(name: str, value: Any) -> str:
    try:
        return _bytes(value).decode()
    except UnicodeDecodeError:
        raise malformed(
            f"the form's field {show(name)} is no text; image files go into fields named image, image1, …"
        ) from None


def _latents(value: Any, shapes: list[tuple[int, int, int]]) -> tuple[list[np.ndarray], str]:
    """``encode``'s structure, one entry an image: ``{"levels": [{"z": ...}, ...]}``, or a bare list
    of levels.

    Without ``z`` there may be ``eps``, in all levels of all images. The second result says which of
    the two it was.
    """
    if isinstance(value, dict):
        value = value.get("results", [value])
    if not isinstance(value, list) or not value:
        raise unusable(
            "bad_latents",
            "latents must be a list with an entry for each image, as encode answers it",
        )
    if len(value) > MAX_IMAGES:
        raise ApiError(
            413,
            "too_many_images",
            f"at most {MAX_IMAGES} images a request, got latents of {len(value)}",
        )
    levels: list[list[np.ndarray]] = [[] for _ in shapes]
    are, limit = _which(value)
    for i, entry in enumerate(value):
        given = entry.get("levels") if isinstance(entry, dict) else entry
        if not isinstance(given, list) or len(given) != len(shapes):
            raise unusable(
                "bad_latents",
                f"latents must have {len(shapes)} levels an image, got "
                f"{len(given) if isinstance(given, list) else show(given)}",
            ).at(i)
        for level, (item, shape) in enumerate(zip(given, shapes, strict=True)):
            try:
                with np.errstate(over="ignore"):  # what becomes infinite is refused below
                    array = np.asarray(
                        item.get(are) if isinstance(item, dict) else item, dtype=np.float32
                    )
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
    """Whether latents are ``z`` or, where not all have it, ``eps``; and how large they may be."""
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


def parse_images(operation: str, request: RawRequest) -> FilesRequest:
    """Take an ``encode``, ``reconstruct`` or ``score`` request apart; no picture is decoded yet.

    Args:
        operation: which of the three.
        request: an image file, an ``.npy``, JSON or a form.

    Raises:
        ApiError: with the status to answer; one bad image among several does not raise.
    """
    sources: list[Any]
    if request.body is None:
        sources, given = _form(request)
    elif _is(request.content_type, "application/json") or isinstance(request.body, (dict, list)):
        given = dict(_json_object(request, MAX_JSON_BYTES))
        sources = _json_images(given)
    elif isinstance(request.body, (bytes, bytearray, memoryview, str)):
        body = _bytes(request.body)
        if not body:
            raise malformed(
                "the request is empty: send an image file, an .npy array, JSON or a form"
            )
        _check_size(len(body))
        sources, given = _split_npy(body), {}
    else:
        raise malformed(
            f"the body must be an image file, an .npy array, JSON or a form, got "
            f"{request.content_type or 'no content type'}"
        )
    parameters = read_parameters(operation, given)
    if not sources:
        raise malformed("the request holds no image")
    if len(sources) > MAX_IMAGES:
        raise ApiError(
            413, "too_many_images", f"at most {MAX_IMAGES} images a request, got {len(sources)}"
        )
    if operation == "score" and len(sources) * parameters["samples"] > MAX_DRAWS:
        raise ApiError(
            413,
            "too_many_draws",
            f"images x samples may be {MAX_DRAWS}, got {len(sources)} x {parameters['samples']}",
        )
    fit = parameters.pop("resize") == "fit"
    pixels = 0
    if fit:  # otherwise pictures of other sizes are refused by their headers
        pixels = sum(header_pixels(source) for source in sources if isinstance(source, bytes))
        if pixels > MAX_REQUEST_PIXELS:
            raise ApiError(
                413,
                "too_large",
                f"the pictures of a request may have {MAX_REQUEST_PIXELS} pixels together, "
                f"these have {pixels}",
            )
    return FilesRequest(sources, parameters, fit, request.probe, pixels)


def decode_images(
    requests: Sequence[FilesRequest], image_shape: tuple[int, int, int], each: Each = map
) -> list[ImagesRequest]:
    """Bring the images of a batch of requests to the model's shape.

    Args:
        requests: as parsed.
        image_shape: ``(H, W, C)`` of the model.
        each: as ``map``, such as that of a pool of threads.
    """
    tasks = [
        (source, image_shape, request.fit, i)
        for request in requests
        for i, source in enumerate(request.sources)
    ]
    made = each(lambda task: prepare_image(*task), tasks)
    return [
        ImagesRequest(list(islice(made, len(request.sources))), request.parameters, request.probe)
        for request in requests
    ]


def _check_size(count: int) -> None:
    if count > MAX_BODY_BYTES:
        raise ApiError(
            413,
            "request_too_large",
            f"a request may have {MAX_BODY_BYTES} bytes, this one has {count}",
        )


def _form(request: RawRequest) -> tuple[list[Any], dict[str, Any]]:
    sources: list[Any] = []
    given: dict[str, Any] = {}
    size = 0
    files = {}
    for name, value in request.fields.items():
        suffix = name.removeprefix("image")
        if name.startswith("image") and (
            not suffix or suffix.isdecimal() and len(suffix) <= MAX_SUFFIX
        ):
            files[int(suffix or 0), name] = _bytes(value)
            size += len(files[int(suffix or 0), name])
        else:
            given[name] = _text(name, value)
    _check_size(size)
    for _, data in sorted(files.items()):
        sources += _split_npy(data)
    return sources, given


def _json_images(given: dict[str, Any]) -> list[Any]:
    images = given.pop("images", None)
    if not isinstance(images, list):
        raise malformed(
            "images must be a list of base64 files"
            + ("" if images is None else f", got {type(images).__name__}")
        )
    if len(images) > MAX_IMAGES:
        raise ApiError(
            413, "too_many_images", f"at most {MAX_IMAGES} images a request, got {len(images)}"
        )
    sources: list[Any] = []
    size = 0
    for i, text in enumerate(images):
        if not isinstance(text, str):
            sources.append(
                malformed(f"an image must be a base64 string, got {type(text).__name__}").at(i)
            )
            continue
        try:
            data = base64.b64decode(
                text.split(",", 1)[1] if text.startswith("data:") and "," in text else text,
                validate=True,
            )
        except (binascii.Error, ValueError) as error:
            sources.append(malformed(f"the image is not base64: {error}").at(i))
            continue
        size += len(data)
        sources.append(data)
    _check_size(size)
    return sources


def _split_npy(data: bytes) -> list[Any]:
    """An ``.npy`` of images to a list of arrays; any other file stays one file."""
    if not data.startswith(b"\x93NUMPY"):
        return [data]
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, fortran, dtype = read(stream)
    except (
        Exception
    ) as error:  # the header is a Python literal, and its parser raises whatever it stumbles over
        raise malformed(f"the .npy file is damaged: {words_of(error)}") from None
    # Told by the header, before any pixel is read: an array of objects would be a pickle.
    if dtype.hasobject:
        raise unusable("bad_array", "the array holds Python objects; expected uint8")
    if dtype != np.uint8:
        raise unusable(
            "bad_array", f"the array must be uint8, got {dtype}" + _nan_note(data, dtype)
        )
    if len(shape) != 4:
        raise unusable("bad_array", f"the array must be (N, H, W, C), got shape {tuple(shape)}")
    if min(shape) < 0:
        raise malformed(f"the .npy file is damaged: shape {tuple(shape)}")
    if shape[0] > MAX_IMAGES:
        raise ApiError(
            413, "too_many_images", f"at most {MAX_IMAGES} images a request, got {shape[0]}"
        )
    shape = tuple(map(int, shape))  # NumPy takes True for 1 here, and refuses it later
    if math.prod(shape) != len(data) - stream.tell():
        raise malformed(
            f"the .npy file is damaged: shape {tuple(shape)} needs {math.prod(shape)} bytes, "
            f"{len(data) - stream.tell()} are there"
        )
    pixels = np.frombuffer(data, np.uint8, offset=stream.tell())  # no copy
    return list(pixels.reshape(shape, order="F" if fortran else "C"))


def _nan_note(data: bytes, dtype: np.dtype) -> str:
    """Say so where the values of a float array are not even numbers."""
    if dtype.kind != "f":
        return ""
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError, MemoryError):
        return ""
    bad = int((~np.isfinite(array)).sum())
    return f" with {bad} values that are not finite" if bad else ""


def prepare_image(
    source: bytes | np.ndarray | ApiError, image_shape: tuple[int, int, int], fit: bool, index: int
) -> InputImage | ApiError:
    """Bring one image to the model's shape, or say why that cannot be.

    Args:
        source: a file, uint8 ``(H, W, C)``, or an error that is passed on.
        image_shape: ``(H, W, C)`` of the model.
        fit: whether to resize what has another size.
        index: of the image, for errors.
    """
    if isinstance(source, ApiError):
        return source
    height, width, channels = image_shape
    if isinstance(source, np.ndarray):
        pixels, notes = source, []
        if pixels.shape[2] != channels:
            return unusable(
                "wrong_shape", f"images must have {channels} channels, got {pixels.shape[2]}"
            ).at(index)
    else:
        try:
            decoded = read_image(source, None if fit else (width, height))
        except ImageError as error:
            status = {"too_large": 413, "wrong_size": 422}.get(error.code, 415)
            return ApiError(status, error.code, str(error), index)
        pixels, notes = decoded.pixels, list(decoded.notes)
        if channels == 1:
            pixels = np.asarray(Image.fromarray(pixels).convert("L"))[:, :, None]
        elif channels != 3:
            return unusable(
                "wrong_shape", f"this model's images have {channels} channels: send an .npy array"
            ).at(index)
    if pixels.shape[:2] == (height, width):
        return InputImage(np.ascontiguousarray(pixels), notes)
    if not fit:
        return unusable(
            "wrong_size",
            f"images must be {width} x {height} pixels, got {pixels.shape[1]} x "
            f'{pixels.shape[0]}; "resize": "fit" resizes them',
        ).at(index)
    if 0 in pixels.shape:
        return unusable(
            "wrong_size", f"the image is empty: {pixels.shape[1]} x {pixels.shape[0]}"
        ).at(index)
    notes.append(
        f"resized from {pixels.shape[1]} x {pixels.shape[0]} to {width} x {height}: this changes the likelihood"
    )
    return InputImage(resize_centre(pixels, height, width), notes, resized=True)
