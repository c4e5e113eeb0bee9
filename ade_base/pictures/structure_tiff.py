"""Reads the structure of BMP, GIF and TIFF files, and of EXIF data, which are TIFF directories."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from ade_base.pictures.limits import (
    MAX_COMMENT_BYTES,
    MAX_DIRECTORIES,
    MAX_EXIF_PREFIXES,
    MAX_GIF_BLOCKS,
    MAX_JUNK_BYTES,
    MAX_METADATA_BYTES,
    MAX_STRIPS,
    MAX_TAGS,
    MAX_TILE_PIXELS,
    PIXELS_A_STRIP,
    UNCOMPRESSED_STRIPS,
    Count,
    ImageError,
    Structure,
    is_plain,
    too_large,
)

EXIF_PREFIX = b"Exif\0\0"
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


def check_exif(data: bytes) -> None:
    """Reject EXIF data whose entries claim more bytes than it has.

    Raises:
        ImageError: it has too many entries, or they overlap.
    """
    prefixes = 0
    while data.startswith(EXIF_PREFIX, 6 * prefixes):
        prefixes += 1
        if prefixes > MAX_EXIF_PREFIXES:
            raise too_large("EXIF prefixes", prefixes, MAX_EXIF_PREFIXES)
    data = data[6 * prefixes :]
    if len(data) >= 8:
        order = ">" if data.startswith(b"MM") else "<"
        _directory(data, order, struct.unpack_from(order + "I", data, 4)[0])


def read_bmp(data: bytes) -> Structure:
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
    return Structure("BMP", width, height, plain and is_plain(data, width, height))


def read_gif(data: bytes) -> Structure:
    """Read the first frame and whether a second follows."""
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    blocks, comments = (
        Count("blocks", MAX_GIF_BLOCKS),
        Count("bytes of comments", MAX_COMMENT_BYTES),
    )
    junk, metadata = (
        Count("bytes between blocks", MAX_JUNK_BYTES),
        Count("bytes of metadata", MAX_METADATA_BYTES),
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


def read_tiff(data: bytes) -> Structure:
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

    directories = Count("directories", MAX_DIRECTORIES)
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
    # Of several numbers Pillow 12 and libtiff take different ones, and then read beyond a tile.
    number(262, 0)
    if 258 in tags and tags[258].count not in (1, number(277, 1)):
        raise _not_plain("one number of bits per value", f"{tags[258].count}")
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
                raise too_large("pixels in tiles", needed * across * down, limit)
        else:
            needed = -(-height // max(1, min(height, number(278, height)))) * planes
        most = min(needed, MAX_STRIPS)
        if compression == 1:
            most = min(most, max(UNCOMPRESSED_STRIPS, width * height // PIXELS_A_STRIP))
        for tag in (273, 279, 324, 325):
            if tag in tags and tags[tag].count > most:
                raise too_large("strips or tiles of its size", tags[tag].count, most)
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
        raise too_large("tags in a directory", count, MAX_TAGS)
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
