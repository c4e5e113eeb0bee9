"""Images as an archive holds them, and the coders that need no model."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ade_base.pictures.limits import ImageError
from ade_base.pictures.read import read_image
from extensions.codec.errors import Damaged

Restored = np.ndarray | bytes  # pixels, uint8 (H, W, C), or a file
_PNG = b"\x89PNG\r\n\x1a\n"
_PIXEL_CHUNKS = {b"IHDR", b"IDAT"}
_FORM = slice(24, 26)  # in a PNG, the bits of each sample and the kind of its pixels
_FORMS = {b"\x08\x00": 1, b"\x08\x02": 3}  # channels: grey and RGB of 8 bits


@dataclass(frozen=True)
class Picture:
    """An image file, or an image of an array.

    Attributes:
        pixels: uint8 ``(H, W, 1)`` or ``(H, W, 3)``; ``None`` for a file that pixels alone do not
            restore.
        stored: the image without the model: the file, or lossless WebP for an image of an array.
        is_file: whether it is a file.
    """

    pixels: np.ndarray | None
    stored: bytes
    is_file: bool

    @property
    def num_bytes(self) -> int:
        """Size in memory."""
        return len(self.stored) + (0 if self.pixels is None else self.pixels.nbytes)

    def restored(self, by_model: bool) -> Restored:
        """What must come back: the file byte for byte, unless the model codes its pixels."""
        if self.is_file and not by_model:
            return self.stored
        assert self.pixels is not None
        return self.pixels


def read_picture(data: bytes) -> Picture:
    """An image file.

    Only a PNG of 8-bit RGB or grey pixels, with nothing beside them that would be lost, has pixels
    here; all other files, and those that cannot be decoded, are kept as they are.

    Raises:
        ImageError: this machine has too little time or memory now. As a file, the image would take
            more room for good.
    """
    if not _is_bare_png(data):
        return Picture(None, data, True)
    try:
        pixels = read_image(data).pixels
    except ImageError as error:
        if error.is_transient:
            raise
        return Picture(None, data, True)
    return Picture(np.ascontiguousarray(pixels[:, :, : _FORMS[data[_FORM]]]), data, True)


def to_webp(pixels: np.ndarray) -> bytes:
    """Lossless WebP of an image ``(H, W, C)``."""
    out = io.BytesIO()
    rgb = np.repeat(pixels, 3 // pixels.shape[2], axis=2)
    # The quality is the effort here. Method 6 gives larger files than 4.
    Image.fromarray(rgb).save(out, "WEBP", lossless=True, method=4, quality=100)
    return out.getvalue()


def from_webp(data: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """The image of this shape that :func:`to_webp` stored.

    Raises:
        Damaged: there is none.
    """
    try:
        pixels = read_image(data, (shape[1], shape[0])).pixels[:, :, : shape[2]]
    except (ImageError, MemoryError) as error:
        raise Damaged(f"an image cannot be decoded: {error or 'no memory'}") from error
    if pixels.shape != shape:
        raise Damaged(f"an image has the shape {pixels.shape}, and the array's have {shape}")
    return pixels


def to_png(pixels: np.ndarray) -> bytes:
    """The file of an image ``(H, W, C)``."""
    out = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(out, "PNG")
    return out.getvalue()


def digest_of(images: Iterable[Restored]) -> str:
    """SHA-256 of what must come back."""
    digest = hashlib.sha256()
    for image in images:
        if isinstance(image, bytes):
            digest.update(b"file %d " % len(image) + image)
        else:
            digest.update(b"pixels %d %d %d " % image.shape + image.tobytes())
    return digest.hexdigest()


def _is_bare_png(data: bytes) -> bool:
    """Whether a file is a PNG of 8-bit RGB or grey pixels, without metadata or colour profiles."""
    if data[: len(_PNG)] != _PNG or data[_FORM] not in _FORMS:
        return False
    types, position = [], len(_PNG)
    while position + 12 <= len(data):
        types.append(data[position + 4 : position + 8])
        position += 12 + int.from_bytes(data[position : position + 4], "big")
    is_whole = position == len(data) and types[-1] == b"IEND"
    return is_whole and set(types[:-1]) == _PIXEL_CHUNKS
