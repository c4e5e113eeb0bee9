"""Images as an archive holds them, and the coders that need no model."""

from __future__ import annotations

import hashlib
import io
import struct
import time
import zlib
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
from PIL import Image

from ade_base.pictures.convert import DecodedImage
from ade_base.pictures.decoders import DecoderError
from ade_base.pictures.limits import ImageError
from ade_base.pictures.read import MAX_FILE_BYTES, MAX_PIXELS, read_image
from ade_base.pictures.structure import read_structure
from extensions.codec.errors import CodingError, Damaged, NotDecoded, TooLarge

# Formats whose pixels are coded and which are written again from them. Files of other formats, and
# all whose pixels are not plain 8-bit RGB or grey, are stored byte for byte.
WRITTEN = {".png": "PNG", ".bmp": "BMP"}
_GREY = ["converted from L to RGB"]
_NEEDED_CHUNKS = {b"IHDR", b"PLTE", b"IDAT", b"IEND"}  # of a PNG; others are metadata
# These say which colours the pixels mean. A file without them is shown in sRGB, so other colours
# would come back.
_COLOUR_CHUNKS = {b"iCCP", b"cICP", b"mDCV", b"cLLI"}
# So do these, unless they have sRGB's own values or stand beside its chunk.
_OF_SRGB = {
    b"gAMA": struct.pack(">I", 45455),
    b"cHRM": struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000),
}
_DEPTH_AT = 24  # in a PNG, the bits of each sample
_PIXELS_PER_METRE = 3780  # in a BMP that Pillow writes
_ATTEMPTS = 3  # to decode an image, on a machine that is too busy for a moment
PAUSE_S = 1.0  # before the second; twice as long before the third
_WEBP = {"lossless": True, "method": 4, "quality": 100}  # smaller than method 6


@dataclass(frozen=True)
class Picture:
    """An image file, or an image of an array.

    Attributes:
        pixels: uint8 ``(H, W, 1)`` or ``(H, W, 3)``; ``None`` for a file stored byte for byte.
        data: the file; empty for an image of an array.
        has_metadata: whether metadata is lost if the pixels are coded.
    """

    pixels: np.ndarray | None
    data: bytes = b""
    has_metadata: bool = False

    @property
    def num_bytes(self) -> int:
        """Size in memory."""
        return len(self.data) + (0 if self.pixels is None else self.pixels.nbytes)

    def stored(self) -> tuple[str, bytes]:
        """The image without a model: ``w`` and lossless WebP, or ``f`` and the file."""
        if self.pixels is None:
            return "f", self.data
        rgb = np.repeat(self.pixels, 3 // self.pixels.shape[2], axis=2)
        out = io.BytesIO()
        if max(rgb.shape) <= 16383:  # the limit of WebP
            Image.fromarray(rgb).save(out, "WEBP", **_WEBP)
        webp = out.getvalue()
        if self.data and not 0 < len(webp) < len(self.data):
            return "f", self.data
        if len(webp) > MAX_FILE_BYTES:
            raise CodingError(
                f"an image of {rgb.shape[1]} x {rgb.shape[0]} pixels has {len(webp):,} bytes as "
                f"lossless WebP: an archive can store {MAX_FILE_BYTES:,}"
            )
        return "w", webp


def read_picture(name: str, data: bytes, keep_metadata: bool) -> Picture:
    """An image file; one that cannot be decoded is a file like any other.

    Raises:
        NotDecoded: this machine has too little time or memory now. As a file, it would take more
            room for good, and a resumed run would find that the images have changed.
    """
    format = WRITTEN.get(PurePosixPath(name).suffix.lower())
    has_metadata = False
    if format == "PNG":
        types, contents = _chunks(data)
        has_metadata = not _NEEDED_CHUNKS.issuperset(types)
        # Fewer bits would be decoded, and restored, as eight.
        is_whole = (
            types[-1:] == [b"IEND"]
            and data[_DEPTH_AT : _DEPTH_AT + 1] == b"\x08"
            and _is_srgb(types, contents)
        )
    else:
        is_whole = _is_plain_bmp(data)
        has_metadata = is_whole and _has_metadata(data)
    if format is None or not is_whole or has_metadata and keep_metadata:
        return Picture(None, data)
    try:
        structure = read_structure(data)
        if structure.format != format:  # such as a JPEG that is called .png
            return Picture(None, data)
        if structure.width * structure.height > MAX_PIXELS:  # further attempts would be in vain
            return Picture(None, data)
        image = _decode(data)
    except (ImageError, Damaged, TooLarge):
        return Picture(None, data)
    if image.notes not in ([], _GREY):
        return Picture(None, data)
    pixels = image.pixels[:, :, :1] if image.notes else image.pixels
    return Picture(np.ascontiguousarray(pixels), data, has_metadata)


def read_stored(kind: str, blob: bytes, is_grey: bool) -> Picture:
    """The image of :meth:`Picture.stored`.

    Raises:
        Damaged: it cannot be decoded.
        NotDecoded: it may be intact, but this machine has too little time or memory; ``TooLarge``
            if it probably always has.
    """
    if kind == "f":
        return Picture(None, blob)
    image = _decode(blob)
    if image.notes:
        raise Damaged("a stored image is not RGB")
    return Picture(image.pixels[:, :, :1] if is_grey else image.pixels)


def write_picture(name: str, picture: Picture) -> bytes:
    """The file of an image.

    Raises:
        Damaged: no encoder would have coded pixels under this name.
    """
    if picture.pixels is None:
        return picture.data
    format = WRITTEN.get(PurePosixPath(name).suffix.lower())
    if format is None:
        raise Damaged("pixels have the name of another format")
    grey = picture.pixels.shape[2] == 1
    out = io.BytesIO()
    Image.fromarray(picture.pixels[:, :, 0] if grey else picture.pixels).save(out, format)
    return out.getvalue()


def update_digest(digest: hashlib._Hash, picture: Picture, is_file: bool) -> None:
    """Enter what must come back of an image: the file, or shape and pixels."""
    if is_file or picture.pixels is None:
        digest.update(b"f%d " % len(picture.data) + picture.data)
    else:
        digest.update(b"p%d %d %d " % picture.pixels.shape + picture.pixels.tobytes())


def _decode(blob: bytes) -> DecodedImage:
    for attempt in range(_ATTEMPTS):
        time.sleep(attempt * PAUSE_S)  # what fails at once, such as for lack of memory, may pass
        try:
            return read_image(blob)
        except (ImageError, MemoryError, DecoderError) as error:
            kind = NotDecoded
            if isinstance(error, ImageError) and not error.is_transient:
                # If it was stored, it had a size and took a time that were permitted then.
                if error.code != "too_large":
                    raise Damaged(f"an image cannot be decoded: {error}") from error
                kind = TooLarge
            reason = str(error) or "no memory"  # the error itself would keep what it could not use
    raise kind(
        f"an image could not be decoded now ({reason}): repeat the command when this machine has "
        "more time or memory"
    )


def _is_srgb(types: list[bytes], contents: dict[bytes, bytes]) -> bool:
    """Whether the pixels of a PNG with these chunks are shown in the same colours without them."""
    return _COLOUR_CHUNKS.isdisjoint(types) and (
        b"sRGB" in types or all(_OF_SRGB[type] == content for type, content in contents.items())
    )


def _chunks(data: bytes) -> tuple[list[bytes], dict[bytes, bytes]]:
    """The types of a PNG's chunks, and the contents of those in ``_OF_SRGB``.

    Both are empty if the file is damaged, cut off, or has more behind the chunks.
    """
    found: list[bytes] = []
    contents: dict[bytes, bytes] = {}
    position = 8
    while position + 12 <= len(data) and found[-1:] != [b"IEND"]:
        end = position + 8 + int.from_bytes(data[position : position + 4], "big")
        if int.from_bytes(data[end : end + 4], "big") != zlib.crc32(data[position + 4 : end]):
            return [], {}
        found.append(data[position + 4 : position + 8])
        if found[-1] in _OF_SRGB:
            contents[found[-1]] = data[position + 8 : end]
        position = end + 4
    return (found, contents) if position == len(data) else ([], {})


def _is_plain_bmp(data: bytes) -> bool:
    """Whether a BMP has 24 or 8 bits per pixel, and only header and palette beside the pixels.

    A fourth byte per pixel may be transparency, which readers of images ignore.
    """
    if len(data) < 54:
        return False
    first, header, width, height, _, bits = struct.unpack_from("<IIiiHH", data, 10)
    (used,) = struct.unpack_from("<I", data, 46)
    colours = used or (256 if bits == 8 else 0)
    row = (width * bits + 31) // 32 * 4
    return (
        bits in (8, 24)
        and first == 14 + header + 4 * colours
        and len(data) == first + row * abs(height)
    )


def _has_metadata(bmp: bytes) -> bool:
    """Whether a BMP has a colour space, or another resolution than the one that is written."""
    (header,) = struct.unpack_from("<I", bmp, 14)
    return header > 40 or not {0, _PIXELS_PER_METRE}.issuperset(struct.unpack_from("<ii", bmp, 38))


def inflate(data: bytes, limit: int) -> bytes:
    """Decompress at most ``limit`` bytes of zlib data.

    Raises:
        Damaged: it is not zlib data, or has more.
    """
    inflater = zlib.decompressobj()
    try:
        result = inflater.decompress(data, limit)
    except zlib.error as error:
        raise Damaged("the table of a chunk is not zlib data") from error
    if not inflater.eof:
        raise Damaged("the table of a chunk is incomplete or too large")
    return result
