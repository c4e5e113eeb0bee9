"""Pictures: image files or arrays, decoded once and brought to the shape that the model sees.

The one way from a source to pixels, for HTTP, the page, the gate, tables of folders and the command
line.

A decoded photograph takes up to 48 MB, and a request may have 64 million pixels. So a picture does
not keep its original: what an encoder needs of it is a :class:`View`, which is
made while the original is in memory, and only the view is kept. At most one original for each
decoding thread is in memory, as without a view.
"""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ade_base.pictures.limits import ImageError
from ade_base.pictures.read import RESIZING, read_image
from ade_base.pictures.show import resize_centre
from ade_base.pictures.view import Look, View
from serving.ingest.errors import ApiError, unusable

RESIZED = "resized from"  # how the note on a resized image begins
# Errors of a file itself. Others, such as those of a network or of expired credentials, may pass.
PERMANENT_ERRORS = (
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EINVAL,  # a pipe, a device or the like
    errno.EFBIG,
    errno.ELOOP,
    errno.ENAMETOOLONG,
)
LookOf = Callable[[bool], Look]  # how an image is looked at, resized or not


def no_look(resized: bool) -> Look:
    """No encoder sees the originals, and nothing is ignored."""
    return Look(0)


@dataclass(frozen=True)
class Picture:
    """One usable image.

    Attributes:
        pixels: uint8 ``(h, w, C)``, as the model sees it.
        notes: on its conversion.
        resized: whether the original had another size.
        view: the original as an encoder sees it; ``None`` without one.
    """

    pixels: np.ndarray
    notes: list[str]
    resized: bool = False
    view: View | None = None


def prepare_image(
    source: bytes | np.ndarray,
    image_shape: tuple[int, int, int],
    resize: bool,
    look_of: LookOf = no_look,
) -> Picture | ApiError:
    """Bring one image to the model's shape, or return the error that prevents it.

    Args:
        source: a file, or uint8 ``(H, W, C)``.
        image_shape: ``(H, W, C)`` of the model.
        resize: whether to resize images of another size.
        look_of: how a usable image is looked at.
    """
    height, width, channels = image_shape
    if isinstance(source, np.ndarray):
        original, notes, size = source, list[str](), (source.shape[1], source.shape[0])
        if original.shape[2] != channels:
            return unusable(
                "wrong_shape", f"images must have {channels} channels, got {original.shape[2]}"
            )
    else:
        try:
            decoded = read_image(source, None if resize else (width, height))
        except ImageError as error:
            status = {"too_large": 413, "wrong_size": 422}.get(error.code, 415)
            return ApiError(status, error.code, str(error), is_transient=error.is_transient)
        original, notes, size = decoded.pixels, list(decoded.notes), decoded.size
        if channels not in (1, 3):
            return unusable(
                "wrong_shape", f"this model's images have {channels} channels: send an .npy array"
            )
    rows, columns = original.shape[:2]
    resized = (rows, columns) != (height, width)
    if resized and not resize:
        return unusable(
            "wrong_size",
            f"images must be {width} x {height} pixels, got {columns} x {rows}; {RESIZING} resizes "
            "them",
        )
    if 0 in original.shape:
        return unusable("wrong_size", f"the image is empty: {columns} x {rows}")
    look = look_of(resized)
    if look.ignored is not None:
        problem = look.ignored.refuses(size)
        if problem is not None:
            return unusable("wrong_size", problem)
        original = look.ignored.fill(original)
    if resized:
        notes.append(
            f"{RESIZED} {columns} x {rows} to {width} x {height}: this changes the likelihood"
        )
    pixels = original
    if channels == 1 and original.shape[2] == 3:
        pixels = np.asarray(Image.fromarray(original).convert("L"))[:, :, None]
    pixels = np.ascontiguousarray(resize_centre(pixels, height, width))
    view = look.of(original) if look.size else None
    if view is not None:  # a large file may be decoded at a reduced size
        view = dataclasses.replace(view, original=(size[1], size[0]))
    return Picture(pixels, notes, resized, view)


def prepare_source(
    read: Callable[[], bytes | np.ndarray],
    image_shape: tuple[int, int, int],
    resize: bool,
    look_of: LookOf = no_look,
) -> Picture | ApiError:
    """Read an image and bring it to the model's shape, or return the error that prevents it.

    For work on many images, which none of them ends: also a file that cannot be read, and an image
    for which memory does not suffice, is an error of this image alone.

    Args:
        read: returns a file or uint8 ``(H, W, C)``.
        image_shape: ``(H, W, C)`` of the model.
        resize: whether to resize images of another size.
        look_of: how a usable image is looked at.
    """
    try:
        return prepare_image(read(), image_shape, resize, look_of)
    except OSError as error:
        code = "too_large" if error.errno == errno.EFBIG else "unreadable"
        # Of some stores without a number.
        passing = error.errno not in PERMANENT_ERRORS and not isinstance(error, FileNotFoundError)
        return ApiError(404, code, error.strerror or str(error), is_transient=passing)
    except MemoryError:
        return ApiError(413, "too_large", "there is no memory to decode it", is_transient=True)
