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
from dataclasses import dataclass

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
MAX_METADATA_BYTES = 4 * 2**20  # profiles, XMP and thumbnails; some photographs have megabytes
MAX_PARTS = 10_000  # chunks or segments: 16 MiB in PNG chunks of 8 KiB are 2,048
MAX_GIF_BLOCKS = 2**17  # 16 MiB in blocks of 255 bytes are 65,793
MAX_COMMENT_BYTES = 2**16  # of a GIF: Pillow joins comments in quadratic time
MAX_JUNK_BYTES = 2**16  # between segments, read byte by byte
MAX_TABLE_BYTES = 2**16  # of a JPEG: four quantisation and eight Huffman tables have 4 KiB
MAX_SCANS = 100  # of a JPEG: each goes over the whole picture; libjpeg's progressive files have 10
MAX_TAGS = 500  # of a directory
MAX_STRIPS = 2**16
# Pillow sorts out uncompressed strips in Python: they may be short only in a large image.
UNCOMPRESSED_STRIPS, PIXELS_A_STRIP = 4096, 256
MAX_TILE_PIXELS = 2**20  # of a TIFF whose image is smaller than its tiles
MAX_EXIF_PREFIXES = 8  # Pillow strips them one by one, in quadratic time
MAX_EXIF_SEGMENTS = 100  # of a JPEG, also joined in quadratic time; 4 MiB need 65
MAX_DIRECTORIES = 8  # of a TIFF image: its own, Exif, GPS and interoperability
# Limits of files that are decoded in this process: small images in simple formats, with little
# metadata.
PLAIN_PIXELS = 2**20
PLAIN_BYTES = 2**20
PLAIN_METADATA_BYTES = 2**16
PLAIN_SCANS = 4  # of a JPEG: one for each component
PLAIN_LOSSLESS_PIXELS = 2**16  # of a WebP, whose codes may take 90 KB for each 16 pixels
# Bytes of a lossless WebP beside four for each pixel: libwebp's files of noise have up to 250. More
# are codes of pixels that it does not have, a thousand times as slow to read as others.
MAX_CODE_BYTES = 2**10

_PIXEL_CHUNKS = frozenset({b"IHDR", b"IDAT", b"fdAT", b"IEND"})
_PLAIN_CHUNKS = frozenset(
    {b"PLTE", b"tRNS", b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"sBIT", b"bKGD", b"tIME", b"tEXt"}
)
# Restart markers and escaped bytes are part of the data.
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_EXIF_PREFIX = b"Exif\0\0"
_EXIF_TEXT = b"exif\0"  # begins a text of a PNG that Pillow reads as EXIF
_TYPE_SIZES = {
    1: 1,
    2: 1,
    3: 2,
    4: 4,
    5: 8,
    6: 1,
    7: 1,
    8: 2,
    9: 4,
    10: 8,
    11: 4,
    12: 8,
    13: 4,
    16: 8,
}
_INTEGERS = {1: "B", 3: "H", 4: "I", 13: "I"}
_SUBDIRECTORIES = (0x8769, 0x8825, 0xA005)  # Exif, GPS, interoperability
_BMP_COMPRESSIONS = {0: "none", 1: "RLE8", 2: "RLE4", 3: "bit fields", 4: "JPEG", 5: "PNG"}
_TIFF_COMPRESSIONS = {1, 5, 8, 32773, 32946}


class ImageError(ValueError):
    """The file is not a usable image.

    ``code`` is ``not_an_image``, ``too_large`` or ``wrong_size``. ``may_pass`` tells that the
    machine may be the cause, so that another attempt may succeed.
    """

    def __init__(self, code: str, message: str, may_pass: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.may_pass = may_pass


@dataclass(frozen=True)
class Structure:
    """Format and size according to the file itself.

    Attributes:
        format: one of :data:`FORMATS`.
        width: in pixels.
        height: in pixels.
        is_plain: whether the file is small and in a simple format whose decoding cost is bounded by
            the size.
    """

    format: str
    width: int
    height: int
    is_plain: bool = False


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


def check_exif(data: bytes) -> None:
    """Reject EXIF data whose entries claim more bytes than it has.

    Raises:
        ImageError: it has too many entries, or they overlap.
    """
    prefixes = 0
    while data.startswith(_EXIF_PREFIX, 6 * prefixes):
        prefixes += 1
        if prefixes > MAX_EXIF_PREFIXES:
            raise _too_large("EXIF prefixes", prefixes, MAX_EXIF_PREFIXES)
    data = data[6 * prefixes :]
    if len(data) >= 8:
        order = ">" if data.startswith(b"MM") else "<"
        _directory(data, order, struct.unpack_from(order + "I", data, 4)[0])


def _too_large(what: str, count: int, limit: int) -> ImageError:
    return ImageError(
        "too_large", f"an image file may have at most {limit} {what}, this one has {count} or more"
    )


def _is_plain(data: bytes, width: int, height: int, metadata: int = 0) -> bool:
    return (
        width * height <= PLAIN_PIXELS
        and len(data) <= PLAIN_BYTES
        and metadata <= PLAIN_METADATA_BYTES
    )


class _Count:
    """Counts the items of one kind and raises above the limit."""

    def __init__(self, what: str, limit: int) -> None:
        self.total = 0
        self._what = what
        self._limit = limit

    def add(self, count: int) -> None:
        self.total += count
        if self.total > self._limit:
            raise _too_large(self._what, self.total, self._limit)


def _png(data: bytes) -> Structure:
    if data[12:16] != b"IHDR":
        raise ImageError(
            "not_an_image",
            f"the image is damaged: the first chunk of a PNG must be IHDR, got {data[12:16]!r}",
        )
    width, height = struct.unpack_from(">II", data, 16)
    chunks, metadata = _Count("chunks", MAX_PARTS), _Count("bytes of metadata", MAX_METADATA_BYTES)
    profiles = _Count("colour profiles", 1)  # Pillow unpacks up to 1 MiB of each
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
    return Structure("PNG", width, height, plain and _is_plain(data, width, height, metadata.total))


def _jpeg(data: bytes) -> Structure:
    width = height = 0
    segments, metadata = (
        _Count("segments", MAX_PARTS),
        _Count("bytes of metadata", MAX_METADATA_BYTES),
    )
    tables, junk = (
        _Count("bytes of tables", MAX_TABLE_BYTES),
        _Count("bytes between segments", MAX_JUNK_BYTES),
    )
    scans = _Count("scans", MAX_SCANS)
    exif, exif_segments = b"", _Count("segments of EXIF", MAX_EXIF_SEGMENTS)
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
            if kind == 0xE1 and data.startswith(_EXIF_PREFIX, body):
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
                height, width = struct.unpack_from(">HH", data, body + 1)
                plain = plain and kind in (0xC0, 0xC1)
        position += length
    if not width or not scans.total:
        raise ImageError(
            "not_an_image", "the image is damaged: a JPEG without a frame or without a scan"
        )
    check_exif(exif)
    plain = plain and not exif and scans.total <= PLAIN_SCANS
    return Structure(
        "JPEG", width, height, plain and _is_plain(data, width, height, metadata.total)
    )


def _webp(data: bytes) -> Structure:
    chunks, metadata = _Count("chunks", MAX_PARTS), _Count("bytes of metadata", MAX_METADATA_BYTES)
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
                raise _too_large("bytes of lossless pixels", least, most)
            plain = plain and width * height <= PLAIN_LOSSLESS_PIXELS
        if kind not in (b"VP8X", b"VP8 ", b"VP8L", b"ALPH"):
            plain = False
            if kind != b"ANMF":
                metadata.add(min(length, len(data) - position))
        # The chunks of an animation's frame are inside, behind its header.
        position += 16 if kind == b"ANMF" else length + length % 2
    return Structure("WEBP", width, height, plain and _is_plain(data, width, height))


def _bmp(data: bytes) -> Structure:
    (header,) = struct.unpack_from("<I", data, 14)
    if header == 12:
        width, height = struct.unpack_from("<HH", data, 18)
        return Structure("BMP", width, height)
    width, height, _, _, compression, _, _, _, colours = struct.unpack_from("<IIHHIIIII", data, 18)
    if data[25] == 0xFF:  # the rows are from top to bottom
        height = 2**32 - height
    if compression not in (0, 3):
        raise ImageError(
            "not_an_image",
            "a BMP must be uncompressed, this one has the compression "
            f"{_BMP_COMPRESSIONS.get(compression, compression)}",
        )
    plain = header == 40 and compression == 0 and colours <= 256
    return Structure("BMP", width, height, plain and _is_plain(data, width, height))


def _gif(data: bytes) -> Structure:
    """Read the first frame and whether a second follows."""
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    blocks, comments = (
        _Count("blocks", MAX_GIF_BLOCKS),
        _Count("bytes of comments", MAX_COMMENT_BYTES),
    )
    junk, metadata = (
        _Count("bytes between blocks", MAX_JUNK_BYTES),
        _Count("bytes of metadata", MAX_METADATA_BYTES),
    )

    def after_block(position: int) -> int:
        blocks.add(1)
        return position + 1 + data[position]

    def after_blocks(position: int) -> int:
        while data[position]:
            position = after_block(position)
        return position + 1

    position = 13 + (6 << (flags & 7) if flags & 128 else 0)
    frames = 0
    try:
        while frames < 2:
            kind, start = data[position], position
            position += 1
            if kind == 0x3B:  # the end
                break
            if kind == 0x21:  # an extension
                label = data[position]
                position += 1
                if label == 0xFE:
                    position = after_blocks(position)
                    comments.add(position - start)
                    continue
                is_loop = (
                    label == 0xFF and not frames and data.startswith(b"NETSCAPE2.0", position + 1)
                )
                position = after_block(position)
                if is_loop:
                    position = after_block(position)
                position = after_blocks(position)
                metadata.add(position - start)
            elif kind == 0x2C:  # a frame
                left, top, columns, rows, flags = struct.unpack_from("<HHHHB", data, position)
                if not frames:
                    width, height = max(width, left + columns), max(height, top + rows)
                frames += 1
                position += 10 + (6 << (flags & 7) if flags & 128 else 0)
                if frames == 1:
                    position = after_blocks(position)
            else:
                junk.add(1)
    except (IndexError, struct.error):
        pass  # it ends early
    if not frames:
        raise ImageError("not_an_image", "the image is damaged: a GIF without a frame")
    return Structure("GIF", width, height)


def _tiff(data: bytes) -> Structure:
    order = ">" if data.startswith(b"MM") else "<"
    version, offset = struct.unpack_from(order + "HI", data, 2)
    if version != 42:
        raise _not_plain("a classic TIFF", f"version {version}")
    tags = _directory(data, order, offset, strict=True)

    def number(tag: int, default: int | None = None) -> int:
        if tag in tags:
            return _integer(tag, tags[tag], order)
        if default is None:
            raise ImageError("not_an_image", f"the image is damaged: a TIFF without tag {tag}")
        return default

    directories = _Count("directories", MAX_DIRECTORIES)
    remaining = [tags]
    while remaining:
        directories.add(1)
        above = remaining.pop()
        remaining += [
            _directory(data, order, _integer(tag, above[tag], order))
            for tag in _SUBDIRECTORIES
            if tag in above
        ]
    width, height = number(256), number(257)
    compression = number(259, 1)
    if compression not in _TIFF_COMPRESSIONS:
        raise _not_plain("no compression, LZW, Deflate or PackBits", f"compression {compression}")
    planes = number(277, 1) if number(284, 1) == 2 else 1
    if width and height:
        if 322 in tags or 323 in tags or 324 in tags:
            across, down = number(322), number(323)
            if 273 in tags:
                raise _not_plain("strips or tiles", "both")
            if not 0 < across * down <= max(width * height, MAX_TILE_PIXELS):
                raise _not_plain(
                    f"tiles not larger than the image, {width} x {height}", f"{across} x {down}"
                )
            needed = -(-width // across) * -(-height // down) * planes
            # One tile may be decoded for a single column of the image, and all may be the same.
            limit = planes * max(4 * width * height, MAX_TILE_PIXELS)
            if needed * across * down > limit:
                raise _too_large("pixels in tiles", needed * across * down, limit)
        else:
            needed = -(-height // max(1, min(height, number(278, height)))) * planes
        most = min(needed, MAX_STRIPS)
        if compression == 1:
            most = min(most, max(UNCOMPRESSED_STRIPS, width * height // PIXELS_A_STRIP))
        for tag in (273, 279, 324, 325):
            if tag in tags and tags[tag].count > most:
                raise _too_large("strips or tiles of its size", tags[tag].count, most)
    if number(274, 1) in (5, 6, 7, 8):  # Pillow itself applies the orientation of a TIFF
        width, height = height, width
    return Structure("TIFF", width, height)


def _not_plain(expected: str, got: str) -> ImageError:
    return ImageError("not_an_image", f"a TIFF must be a plain one: expected {expected}, got {got}")


@dataclass(frozen=True)
class _Entry:
    kind: int
    count: int
    value: bytes  # four bytes: the value or its offset


def _integer(tag: int, entry: _Entry, order: str) -> int:
    if entry.count != 1 or entry.kind not in _INTEGERS:
        raise _not_plain(f"one integer in tag {tag}", f"{entry.count} of type {entry.kind}")
    return int(struct.unpack_from(order + _INTEGERS[entry.kind], entry.value)[0])


def _directory(data: bytes, order: str, offset: int, strict: bool = False) -> dict[int, _Entry]:
    """Read the entries of a TIFF or EXIF directory, as far as Pillow reads them.

    Args:
        data: the file; offsets count from its start.
        order: ``<`` or ``>``.
        offset: of the directory.
        strict: reject what Pillow and libtiff read differently: repeated tags, and tags that reach
            beyond the file.
    """
    if offset + 2 > len(data):
        return {}
    (count,) = struct.unpack_from(order + "H", data, offset)
    if count > MAX_TAGS:
        raise _too_large("tags in a directory", count, MAX_TAGS)
    found: dict[int, _Entry] = {}
    total = 0
    for position in range(offset + 2, min(offset + 2 + 12 * count, len(data) - 11), 12):
        tag, kind, number, value = struct.unpack_from(order + "HHI4s", data, position)
        if strict and tag in found:
            raise _not_plain(f"tag {tag} once", "two")
        found[tag] = _Entry(kind, number, value)
        size = number * _TYPE_SIZES.get(kind, 0)
        if size <= 4:
            continue
        if struct.unpack(order + "I", value)[0] + size > len(data):
            if strict:
                raise ImageError(
                    "not_an_image", f"the image is damaged: tag {tag} reaches beyond the file"
                )
            break  # as Pillow does
        total += size
        if total > len(data):
            raise ImageError(
                "too_large",
                f"the tags of a directory may have at most {len(data)} bytes, as their file, "
                f"these have {total} or more",
            )
    return found


_READERS: tuple[tuple[re.Pattern[bytes], Callable[[bytes], Structure]], ...] = (
    (re.compile(rb"\x89PNG\r\n\x1a\n"), _png),
    (re.compile(rb"\xff\xd8\xff"), _jpeg),
    (re.compile(rb"RIFF....WEBPVP8[ LX]", re.DOTALL), _webp),
    (re.compile(rb"BM"), _bmp),
    (re.compile(rb"GIF8[79]a"), _gif),
    (re.compile(rb"II[*+]\0|MM\0[*+]|II\0\*|MM\*\0"), _tiff),
)
