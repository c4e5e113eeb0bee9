"""Reads the structure of an image file before any decoder runs.

A small file can make a decoder do a lot of work. The functions below find the size of the image and
reject files that cost more than an image of that size needs. They do not validate: truncated or
inconsistent files are left to the decoder, which reports the damage. They follow Pillow's way of
reading each format, because a limit that is counted differently would not hold.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable

from ade_base.pictures.limits import (
    FORMATS,
    MAX_CODE_BYTES,
    MAX_EXIF_SEGMENTS,
    MAX_JUNK_BYTES,
    MAX_METADATA_BYTES,
    MAX_PARTS,
    MAX_SCANS,
    MAX_TABLE_BYTES,
    PLAIN_LOSSLESS_PIXELS,
    PLAIN_SCANS,
    Count,
    ImageError,
    Structure,
    is_plain,
    too_large,
)
from ade_base.pictures.structure_heif import read_heif
from ade_base.pictures.structure_tiff import EXIF_PREFIX, check_exif, read_bmp, read_gif, read_tiff

_PIXEL_CHUNKS = frozenset({b"IHDR", b"IDAT", b"fdAT", b"IEND"})
_PLAIN_CHUNKS = frozenset(
    {b"PLTE", b"tRNS", b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"sBIT", b"bKGD", b"tIME", b"tEXt"}
)
# Restart markers and escaped bytes are part of the data.
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_EXIF_TEXT = b"exif\0"  # begins a text of a PNG that Pillow reads as EXIF


def read_structure(data: bytes) -> Structure:
    """Find a file's format and size.

    Args:
        data: the whole file.

    Raises:
        ImageError: the format is unknown, or decoding would cost too much.
    """
    for start, read in _READERS:
        if start.match(data):
            try:
                structure = read(data)
            except (struct.error, IndexError):
                raise ImageError(
                    "not_an_image",
                    f"the image is damaged: it ends after {len(data)} bytes, before its size",
                ) from None
            if not structure.width * structure.height:
                raise ImageError(
                    "not_an_image", f"the image is empty: {structure.width} x {structure.height}"
                )
            return structure
    raise ImageError(
        "not_an_image",
        f"not an image: expected {', '.join(FORMATS)}, got {len(data)} bytes that "
        f"start with {data[:8].hex(' ')}",
    )


def _png(data: bytes) -> Structure:
    if data[12:16] != b"IHDR":
        raise ImageError(
            "not_an_image",
            f"the image is damaged: the first chunk of a PNG must be IHDR, got {data[12:16]!r}",
        )
    width, height = struct.unpack_from(">II", data, 16)
    chunks, metadata = Count("chunks", MAX_PARTS), Count("bytes of metadata", MAX_METADATA_BYTES)
    profiles = Count("colour profiles", 1)  # Pillow unpacks up to 1 MiB of each
    plain = True
    position, end = 8, len(data)
    while position + 8 <= end:
        length, kind = struct.unpack_from(">I4s", data, position)
        position += 8
        chunks.add(1)
        if kind == b"IEND":
            break
        if kind not in _PIXEL_CHUNKS:
            metadata.add(min(length, end - position))
            if kind == b"iCCP":
                profiles.add(1)
            if kind == b"eXIf":
                check_exif(data[position : position + length])
            elif kind == b"tEXt" and data.startswith(_EXIF_TEXT, position):
                check_exif(data[position + len(_EXIF_TEXT) : position + length])
            plain = (
                plain
                and kind in _PLAIN_CHUNKS
                and not data.startswith((b"Raw profile", _EXIF_TEXT), position)
            )
        elif kind == b"fdAT":
            plain = False
        position += length + 4
    return Structure("PNG", width, height, plain and is_plain(data, width, height, metadata.total))


def _jpeg(data: bytes) -> Structure:
    width = height = 0
    segments, metadata = (
        Count("segments", MAX_PARTS),
        Count("bytes of metadata", MAX_METADATA_BYTES),
    )
    tables, junk = (
        Count("bytes of tables", MAX_TABLE_BYTES),
        Count("bytes between segments", MAX_JUNK_BYTES),
    )
    scans = Count("scans", MAX_SCANS)
    exif, exif_segments = b"", Count("segments of EXIF", MAX_EXIF_SEGMENTS)
    plain = True
    position = 2
    # Before the first scan Pillow reads byte by byte, after it libjpeg does.
    while marker := _MARKER.search(
        data, position, len(data) if scans.total else position + MAX_JUNK_BYTES
    ):
        if not scans.total:
            junk.add(marker.start() - position)
        kind = data[marker.start() + 1]
        position = marker.end()
        segments.add(1)
        if kind == 0xD9 and scans.total:  # the end
            break
        if kind < 0xC0 or kind in (0xC8, 0xD8, 0xD9) or 0xF0 <= kind <= 0xFD:
            plain = False  # a marker without a length, or whose length Pillow does not read
            continue
        if position + 2 > len(data):
            break
        length = max(2, struct.unpack_from(">H", data, position)[0])
        body = position + 2
        if kind >= 0xE0:  # application segments and comments
            metadata.add(length)
            if kind == 0xE1 and data.startswith(EXIF_PREFIX, body):
                exif_segments.add(1)
                exif += data[body + 6 * bool(exif) : position + length]  # Pillow joins them
            elif kind == 0xE2 and data.startswith(b"MPF\0", body):
                check_exif(data[body + 4 : position + length])
                plain = False
        elif kind == 0xDA:
            scans.add(1)
        else:
            tables.add(length)
            if kind not in (0xC4, 0xCC) and kind <= 0xCF and not scans.total:  # a frame's header
                if width:  # of which Pillow takes the last, for whose width it has memory
                    raise ImageError("not_an_image", "the image is damaged: a JPEG has two frames")
                height, width = struct.unpack_from(">HH", data, body + 1)
                plain = plain and kind in (0xC0, 0xC1)
        position += length
    if not width or not scans.total:
        raise ImageError(
            "not_an_image", "the image is damaged: a JPEG without a frame or without a scan"
        )
    check_exif(exif)
    structure = Structure("JPEG", width, height)
    if scans.total * structure.effort > MAX_SCANS:
        raise too_large("scans of its size", scans.total, int(MAX_SCANS / structure.effort))
    plain = plain and not exif and scans.total <= PLAIN_SCANS
    return Structure("JPEG", width, height, plain and is_plain(data, width, height, metadata.total))


def _webp(data: bytes) -> Structure:
    chunks, metadata = Count("chunks", MAX_PARTS), Count("bytes of metadata", MAX_METADATA_BYTES)
    kind, header = data[12:16], data[20:30]
    if kind == b"VP8X":
        width = 1 + int.from_bytes(header[4:7], "little")
        height = 1 + int.from_bytes(header[7:10], "little")
    elif kind == b"VP8L":
        sides = struct.unpack_from("<I", header, 1)[0]
        width, height = 1 + (sides & 0x3FFF), 1 + (sides >> 14 & 0x3FFF)
    else:
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", header, 6))
    plain = True
    position = 12
    while position + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, position)
        position += 8
        chunks.add(1)
        if kind == b"EXIF":
            check_exif(data[position : position + length])
        if kind in (b"VP8L", b"ALPH"):
            least, most = min(length, len(data) - position), MAX_CODE_BYTES + 4 * width * height
            if least > most:
                raise too_large("bytes of lossless pixels", least, most)
            plain = plain and width * height <= PLAIN_LOSSLESS_PIXELS
        if kind not in (b"VP8X", b"VP8 ", b"VP8L", b"ALPH"):
            plain = False
            if kind != b"ANMF":
                metadata.add(min(length, len(data) - position))
        # The chunks of an animation's frame are inside, behind its header.
        position += 16 if kind == b"ANMF" else length + length % 2
    return Structure("WEBP", width, height, plain and is_plain(data, width, height))


_READERS: tuple[tuple[re.Pattern[bytes], Callable[[bytes], Structure]], ...] = (
    (re.compile(rb"\x89PNG\r\n\x1a\n"), _png),
    (re.compile(rb"\xff\xd8\xff"), _jpeg),
    (re.compile(rb"RIFF....WEBPVP8[ LX]", re.DOTALL), _webp),
    (re.compile(rb"BM"), read_bmp),
    (re.compile(rb"GIF8[79]a"), read_gif),
    (re.compile(rb"....ftyp(avi[fs]|mif1|msf1|he[iv][cxms])", re.DOTALL), read_heif),
    (re.compile(rb"II[*+]\0|MM\0[*+]|II\0\*|MM\*\0"), read_tiff),
)
