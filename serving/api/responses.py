"""Turns results into HTTP answers and errors, whatever server sends them."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from ade_client.contract import Problem
from serving.ingest.errors import ApiError, problem_of, unusable
from serving.ingest.picture import Picture
from serving.ingest.requests import JSON_TYPE

PNG_TYPE = "image/png"
NPY_TYPE = "application/x-npy"
NPZ_TYPE = "application/x-npz"
MAX_ANSWER_BYTES = 64 * 2**20
HEAD_BYTES = 1024  # of a file besides its pixels or numbers, or of an entry in JSON
Result = TypeVar("Result")


@dataclass(frozen=True)
class Response:
    """One answer: ``headers`` beside the content type, and its ``error`` if it is one."""

    status: int
    content_type: str
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)
    error: ApiError | None = None


def json_response(value: Any, status: int = 200) -> Response:
    """An object as JSON."""
    import orjson  # here, because the client uses this room's models without that package

    try:
        body = orjson.dumps(value)
    except TypeError:  # a message that quotes half a surrogate pair, which is not UTF-8
        body = json.dumps(value).encode()
    return Response(status, JSON_TYPE, body)


def error_response(error: ApiError) -> Response:
    """An error answer, with ``Retry-After`` if another try may help."""
    response = dataclasses.replace(json_response(error.body(), error.status), error=error)
    if error.status == 503:
        response.headers["Retry-After"] = "1"
    return response


def npy_response(array: np.ndarray) -> Response:
    out = io.BytesIO()
    np.save(out, array, allow_pickle=False)
    return Response(200, NPY_TYPE, out.getvalue())


def npz_response(arrays: Mapping[str, np.ndarray]) -> Response:
    out = io.BytesIO()
    np.savez(out, **dict(arrays))  # type: ignore[arg-type]  # names are not its options
    return Response(200, NPZ_TYPE, out.getvalue())


def check_size(num_bytes: int, advice: str) -> None:
    """Refuse an answer that would be too long.

    Raises:
        ApiError: 422 ``answer_too_large``, with the advice.
    """
    if num_bytes > MAX_ANSWER_BYTES:
        raise unusable(
            "answer_too_large",
            f"the answer would have {num_bytes} bytes, at most {MAX_ANSWER_BYTES} are "
            f"sent: {advice}",
        )


def picture_bytes(image_shape: tuple[int, int, int]) -> int:
    """Upper bound of the length of one picture in any format, for ``(H, W, C)``."""
    return 2 * math.prod(image_shape) + HEAD_BYTES


def fail_on_error(images: Sequence[Picture | ApiError]) -> None:
    """Raise the first error: binary formats have no place for errors beside results."""
    for image in images:
        if isinstance(image, ApiError):
            raise image


def results_of(
    images: Sequence[Picture | ApiError],
    result: Callable[[int, Picture], Result | ApiError],
) -> list[Result | Problem]:
    """One entry per image, each a result or an error.

    Args:
        images: of the request.
        result: of a usable image, by its number among the usable ones.

    Raises:
        ApiError: the first error, if no image has a result.
    """
    entries: list[Result | Problem] = []
    errors: list[ApiError] = []
    row = 0
    for index, image in enumerate(images):
        found: Result | ApiError
        if isinstance(image, Picture):
            found = result(row, image)
            row += 1
        else:
            found = image
        if isinstance(found, ApiError):
            errors.append(found.at(index))
            entries.append(problem_of(errors[-1]))
        else:
            entries.append(found)
    if len(errors) == len(images):
        raise errors[0]
    return entries
