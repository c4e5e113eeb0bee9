"""Turns HTTP requests into images and parameters, whatever server received them.

A request is accepted or refused as a whole, except for its images: an :class:`ApiError` takes the
place of an image that cannot be used, and the other images are processed.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Generic, TypeVar

import numpy as np

from ade_base.messages import show, words_of
from ade_base.pictures.read import header_pixels
from ade_client.contract import MAX_IMAGES
from serving.ingest.errors import ApiError, malformed, unusable
from serving.ingest.picture import LookOf, Picture, no_look, prepare_image

MAX_BODY_BYTES = 16 * 2**20
MAX_JSON_BYTES = 24 * 2**20  # of images: 16 MiB of files are 22 MiB in base64
MAX_JSON_VALUES = 100_000  # without latents: far more than images and parameters have
JSON_BYTES_PER_NUMBER = 26  # at most, with what stands between two
MAX_SUFFIX = 4  # digits of a form's field such as image12
MAX_REQUEST_PIXELS = 64_000_000  # before resizing; a second or two to decode
JSON_TYPE = "application/json"
URLENCODED = "application/x-www-form-urlencoded"
MULTIPART = "multipart/form-data"
Each = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]
Parameters = TypeVar("Parameters")


@dataclass(frozen=True)
class RawRequest:
    """A request as the server hands it over.

    Attributes:
        content_type: of the body, as sent.
        body: bytes, text, or the parsed value of a JSON body; ``None`` for a form.
        fields: of a form, values as bytes or text.
        probe: whether this only checks that the service answers (header :data:`PROBE_HEADER`);
            metrics and logs leave it out.
        id: identifies the request in logs.
        error: if the server could not read the request; it is then the answer.
        translate: turns the answer into that of another protocol, and must not raise.
    """

    content_type: str
    body: Any
    fields: Mapping[str, Any] = field(default_factory=dict)
    probe: bool = False
    id: str = ""
    error: ApiError | None = None
    translate: Callable[[Any], Any] | None = None  # a serving.api.responses.Response


@dataclass(frozen=True)
class FilesRequest(Generic[Parameters]):
    """Images that are not decoded yet.

    Attributes:
        sources: one per image: a file, pixels, or an error.
        parameters: of the operation.
        format: of the answer.
        resize: whether images of another size are resized.
        probe: as in :class:`RawRequest`.
        pixels: number of pixels of all files that may be resized, by their headers.
    """

    sources: list[bytes | np.ndarray | ApiError]
    parameters: Parameters
    format: str | None
    resize: bool
    probe: bool = False
    pixels: int = 0


@dataclass(frozen=True)
class ImagesRequest(Generic[Parameters]):
    """Images, with an error in the place of an unusable one, and the operation's parameters."""

    images: list[Picture | ApiError]
    parameters: Parameters
    format: str | None
    probe: bool = False

    @property
    def usable(self) -> list[Picture]:
        return [image for image in self.images if isinstance(image, Picture)]

    @property
    def count(self) -> int:
        """Number of images to compute."""
        return len(self.usable)


@dataclass(frozen=True)
class JsonLimits:
    """How large a JSON text may be, counted before it is parsed."""

    bytes: int
    lists: int = MAX_JSON_VALUES
    values: int = MAX_JSON_VALUES


def is_type(content_type: str, *kinds: str) -> bool:
    """Whether a ``Content-Type`` is one of these media types."""
    return content_type.split(";")[0].strip().lower() in kinds


def _bytes(value: Any) -> bytes:
    if isinstance(value, str):
        return value.encode()
    if not isinstance(value, (bytes, bytearray, memoryview)):
        raise malformed(f"a part of the form must be text or a file, got {type(value).__name__}")
    return bytes(value)


def counted_json(
    text: bytes | bytearray | memoryview | str, name: str, limits: JsonLimits
) -> bytes:
    """The bytes of a JSON text whose bytes, lists and values are few enough to be parsed.

    Parsed values take many times the memory of their text.

    Args:
        text: a body or a field of a form.
        name: its name in errors.
        limits: the largest counts.

    Raises:
        ApiError: 413; or 400, it is neither text nor bytes.
    """
    if len(text) > limits.bytes:
        raise ApiError(
            413,
            "request_too_large",
            f"JSON may have at most {limits.bytes} bytes here, {name} has {len(text)}",
        )
    data = _bytes(text)
    for what, most, count in (
        ("lists and objects", limits.lists, data.count(b"[") + data.count(b"{")),
        ("values", limits.values, data.count(b",")),
    ):
        if count > most:
            raise ApiError(
                413,
                "request_too_large",
                f"JSON may have at most {most} {what} here, {name} has {count}",
            )
    return data


def parse_json(text: bytes | bytearray | memoryview | str, name: str, limits: JsonLimits) -> Any:
    """Parse JSON that is small enough; arguments as for :func:`counted_json`.

    Raises:
        ApiError: 413 or 400; among others, an object has a key more than once, of which parsers
            use different ones: a proxy that checks requests must see what is answered.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            repeated, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            raise malformed(f"{name} has the key {show(repeated)} more than once")
        return found

    data = counted_json(text, name, limits)
    try:
        return json.loads(data, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise malformed(f"{name} is not JSON: {error}") from None


def array_of(value: Any, of_booleans: bool = False) -> np.ndarray:
    """The array of a number, or of nested lists of numbers, from JSON.

    If one of the values is text, NumPy makes text of all, each as long as the longest: gigabytes of
    a few megabytes of JSON. Of a boolean among numbers it makes 0 or 1.

    Raises:
        TypeError: one of the values is text, or a boolean unless it is an array of these.
        ValueError: the lists do not have the lengths of an array.
    """
    lists = [[value]]
    while lists:
        items = lists.pop()
        kinds = set(map(type, items))
        if str in kinds or (bool in kinds and not of_booleans):
            raise TypeError("there is text or a boolean among the numbers")
        if list in kinds:
            lists += [item for item in items if isinstance(item, list)]
    return np.asarray(value)


def json_object(request: RawRequest, limits: JsonLimits) -> dict[str, Any]:
    """The JSON object of a request, whether the server has parsed it or not."""
    body = request.body
    if isinstance(body, (bytes, bytearray, memoryview, str)):
        body = parse_json(body, "the body", limits)
    if not isinstance(body, dict):
        raise malformed(f"the body must be a JSON object, got {type(body).__name__}")
    return body


def form_text(name: str, value: Any) -> str:
    """The text of a form's field."""
    try:
        return _bytes(value).decode()
    except UnicodeDecodeError:
        raise malformed(
            f"the form's field {show(name)} must be text; image files go into fields named "
            "image, image1, …"
        ) from None


def image_sources(request: RawRequest) -> tuple[list[Any], dict[str, Any]]:
    """The images of a request, not decoded, and the values that came with them.

    Args:
        request: an image file, an ``.npy``, JSON or a form.

    Returns:
        One source per image as in :class:`FilesRequest`, and the unchecked parameters.

    Raises:
        ApiError: with the status to answer; one bad image among several does not raise.
    """
    if request.body is None:
        return _form(request)
    if is_type(request.content_type, JSON_TYPE) or isinstance(request.body, (dict, list)):
        given = dict(json_object(request, JsonLimits(MAX_JSON_BYTES)))
        return _json_images(given), given
    if isinstance(request.body, (bytes, bytearray, memoryview, str)):
        body = _bytes(request.body)
        if not body:
            raise malformed(
                "the request is empty: send an image file, an .npy array, JSON or a form"
            )
        _check_size(len(body))
        return _split_npy(body), {}
    raise malformed(
        f"the body must be an image file, an .npy array, JSON or a form, got "
        f"{request.content_type or 'no content type'}"
    )


def pixels_to_resize(sources: Sequence[Any]) -> int:
    """Number of pixels of all files of a request, by their headers.

    Raises:
        ApiError: 413, too many.
    """
    pixels = sum(header_pixels(source) for source in sources if isinstance(source, bytes))
    if pixels > MAX_REQUEST_PIXELS:
        raise ApiError(
            413,
            "too_large",
            f"the images of a request may have at most {MAX_REQUEST_PIXELS} pixels together, "
            f"these have {pixels}",
        )
    return pixels


def decode_images(
    requests: Sequence[FilesRequest[Parameters]],
    image_shape: tuple[int, int, int],
    each: Each = map,
    looks: Callable[[Any], LookOf] = lambda parameters: no_look,
) -> list[ImagesRequest[Parameters]]:
    """Decode the images of a batch of requests and bring them to the model's shape.

    Args:
        requests: as parsed.
        image_shape: ``(H, W, C)`` of the model.
        each: works like ``map``, for example the ``map`` of a thread pool.
        looks: from a request's parameters to how an encoder sees its images.
    """

    def prepare(
        task: tuple[int, bytes | np.ndarray | ApiError, bool, LookOf],
    ) -> Picture | ApiError:
        index, source, resize, look_of = task
        made = (
            source
            if isinstance(source, ApiError)
            else prepare_image(source, image_shape, resize, look_of)
        )
        return made.at(index) if isinstance(made, ApiError) else made

    tasks = [
        (i, source, request.resize, look_of)
        for request in requests
        for look_of in [looks(request.parameters)]
        for i, source in enumerate(request.sources)
    ]
    made = each(prepare, tasks)
    return [
        ImagesRequest(
            list(islice(made, len(request.sources))),
            request.parameters,
            request.format,
            request.probe,
        )
        for request in requests
    ]


def check_count(count: int) -> None:
    """Refuse a request with too many images.

    Raises:
        ApiError: 413.
    """
    if count > MAX_IMAGES:
        raise ApiError(
            413, "too_many_images", f"at most {MAX_IMAGES} images per request, got {count}"
        )


def _check_size(count: int) -> None:
    if count > MAX_BODY_BYTES:
        raise ApiError(
            413,
            "request_too_large",
            f"a request may have at most {MAX_BODY_BYTES} bytes, this one has {count}",
        )


def is_image_field(name: str) -> bool:
    """Whether a form's field holds an image, or several: ``image``, ``image1`` …"""
    suffix = name.removeprefix("image")
    return name.startswith("image") and (
        not suffix or suffix.isdecimal() and len(suffix) <= MAX_SUFFIX
    )


def _form(request: RawRequest) -> tuple[list[Any], dict[str, Any]]:
    sources: list[Any] = []
    given: dict[str, Any] = {}
    size = 0
    files = {}
    for name, value in request.fields.items():
        if is_image_field(name):
            place = int(name.removeprefix("image") or 0), name
            files[place] = _bytes(value)
            size += len(files[place])
        else:
            given[name] = form_text(name, value)
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
    check_count(len(images))
    sources: list[Any] = []
    size = 0
    for text in images:
        if not isinstance(text, str):
            sources.append(
                malformed(f"an image must be a base64 string, got {type(text).__name__}")
            )
            continue
        try:
            data = base64.b64decode(
                text.split(",", 1)[1] if text.startswith("data:") and "," in text else text,
                validate=True,
            )
        except (binascii.Error, ValueError) as error:
            sources.append(malformed(f"the image is not base64: {error}"))
            continue
        size += len(data)
        sources.append(data)
    _check_size(size)
    return sources


def _split_npy(data: bytes) -> list[Any]:
    """Split an ``.npy`` of images into a list of arrays; any other file stays one file."""
    if not data.startswith(b"\x93NUMPY"):
        return [data]
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }.get(version)
        if read is None:
            raise ValueError(f"its version must be 1.0 or 2.0, got {'.'.join(map(str, version))}")
        shape, fortran, dtype = read(stream)
    except Exception as error:  # the header is a Python literal: its parser raises many kinds
        raise malformed(f"the .npy file is damaged: {words_of(error)}") from None
    # NumPy fails on such numbers, and so does writing their product into a message.
    if any(abs(size) > MAX_BODY_BYTES for size in shape):
        raise malformed("the .npy file is damaged: its shape is larger than any file")
    # The header is checked before any pixel is read: an array of objects would be a pickle.
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
    check_count(shape[0])
    shape = tuple(map(int, shape))  # NumPy accepts True as 1 here, and refuses it later
    if math.prod(shape) != len(data) - stream.tell():
        raise malformed(
            f"the .npy file is damaged: shape {tuple(shape)} needs {math.prod(shape)} bytes, "
            f"{len(data) - stream.tell()} are there"
        )
    pixels = np.frombuffer(data, np.uint8, offset=stream.tell())  # no copy
    try:
        return list(pixels.reshape(shape, order="F" if fortran else "C"))
    except ValueError:  # empty, and beside the 0 too large
        raise malformed("the .npy file is damaged: no array can have its shape") from None


def _nan_note(data: bytes, dtype: np.dtype) -> str:
    """A note for the error: the number of values of a float array that are not finite."""
    if dtype.kind != "f":
        return ""
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError, MemoryError):
        return ""
    bad = int((~np.isfinite(array)).sum())
    return f" with {bad} values that are not finite" if bad else ""
