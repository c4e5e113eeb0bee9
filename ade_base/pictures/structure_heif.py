"""Reads the structure of AVIF and HEIC files: boxes, which describe items; one of them is shown."""

from __future__ import annotations

import importlib.util
import re
import struct
from collections import defaultdict
from collections.abc import Iterator

from ade_base.pictures.limits import (
    FORMATS,
    MAX_CODED_PIXELS,
    MAX_ITEM_DEPTH,
    MAX_METADATA_BYTES,
    MAX_PARTS,
    Count,
    ImageError,
    Structure,
    too_large,
)

_EXIF_ITEM = re.compile(rb"(infe[\2\3].{7}(?:..)?)Exif", re.DOTALL)
# Boxes that consist of others, each in the one around it, and how many bytes precede these.
_HEADS = {b"/meta": 4, b"meta/iprp": 0, b"iprp/ipco": 0, b"meta/iref": 4}
HEIF_REQUIREMENT = "pillow-heif>=1.8.1,<2"


def read_heif(data: bytes) -> Structure:
    """Read the size of the item that is shown, and what it costs to decode each item.

    libheif turns and crops an item as its properties say. Of an AVIF, Pillow gives the stored
    pixels, and their rotation as EXIF.
    """
    brands = data[8:12] if data[8:12] not in (b"mif1", b"msf1") else data[8 : _number(data, 0, 4)]
    is_avif = b"avif" in brands or b"avis" in brands
    if not is_avif and importlib.util.find_spec("pillow_heif") is None:
        raise ImageError(
            "not_an_image",
            f"this is a HEIC file; without the package pillow-heif only {', '.join(FORMATS[:-1])} "
            f"are accepted. To install it: pip install '{HEIF_REQUIREMENT}'",
        )
    parts = Count("boxes, items and references", MAX_PARTS)
    metadata = Count("bytes of metadata", MAX_METADATA_BYTES)
    shown, wide, kinds = -1, 2, list[tuple[bytes, bytes]]()
    properties, sources = defaultdict[int, list[int]](list), defaultdict[int, list[int]](list)
    for inside, box, at, end in _walk(data, b"", 0, len(data), parts):
        wide = wide if inside == b"iref" else 4 if data[at] else 2  # bytes of an item's number
        if not inside:
            metadata.add(end - at if box != b"mdat" else 0)
        if box == b"moov" and not is_avif:
            raise ImageError("not_an_image", "a HEIC must be a still image, this one is a sequence")
        if box == b"pitm":
            shown = _number(data, at + 4, wide)
        elif box == b"iinf":
            parts.add(_number(data, at + 4, wide))
        elif box == b"iloc":  # libavif searches all items for each
            parts.add(_number(data, at + 6, 4 if data[at] > 1 else 2))
        elif inside == b"iref":
            count, first = _number(data, at + wide, 2), at + wide + 2
            parts.add(count)
            if box == b"dimg":  # derived from others, as a grid from its tiles
                to = [_number(data, first + wide * i, wide) for i in range(count)]
                sources[_number(data, at, wide)] += to
        elif inside == b"ipco":
            kinds.append((box, data[at : min(end, at + 32)]))
        elif box == b"ipma":
            _associate(data, at, properties, parts)

    def values(item: int) -> Iterator[tuple[bytes, bytes]]:
        return (kinds[i - 1] for i in properties[item] if 0 < i <= len(kinds))

    width = height = bits = 0
    for property, content in values(shown):
        if property == b"ispe":
            width, height = struct.unpack_from(">II", content, 4)
        elif property == b"pixi":
            bits = content[5]
        elif property == b"clap" and not is_avif:
            across, per, down, by = struct.unpack_from(">4I", content)
            width, height = round(across / max(per, 1)), round(down / max(by, 1))
        elif property == b"irot" and not is_avif and content[0] % 2:
            width, height = height, width
    if not width:
        raise ImageError("not_an_image", "the image is damaged: it names no picture to show")
    pixels = {
        item: sum(
            _number(content, 4, 4) * _number(content, 8, 4)
            for property, content in values(item)
            if property == b"ispe"
        )
        for item in [*properties]
    }
    _check_cost(pixels, sources, max(8 * width * height, MAX_CODED_PIXELS))
    return Structure("AVIF" if is_avif else "HEIF", width, height, bits=bits)


def boxes(data: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """The boxes in a part of a file: type, and where the content starts and ends."""
    while start + 8 <= end:
        size, kind = struct.unpack_from(">I4s", data, start)
        content = start + 8
        if size == 1:
            size, content = _number(data, content, 8), content + 8
        stop = start + size if size else end
        yield kind, content, min(stop, end)
        start = max(stop, content)


def _walk(
    data: bytes, inside: bytes, start: int, end: int, parts: Count
) -> Iterator[tuple[bytes, bytes, int, int]]:
    """All boxes that matter, each with the type of the one around it."""
    for kind, at, stop in boxes(data, start, end):
        parts.add(1)
        if at < stop:
            yield inside, kind, at, stop
            if (head := _HEADS.get(inside + b"/" + kind)) is not None:
                yield from _walk(data, kind, at + head, stop, parts)


def without_exif(data: bytes) -> bytes:
    """The file with its EXIF items under another type, so that nobody reads them.

    They have no effect: the properties of an item tell how it is turned.
    """
    for box, start, end in boxes(data, 0, len(data)):
        if box == b"meta":
            data = data[:start] + _EXIF_ITEM.sub(rb"\1none", data[start:end]) + data[end:]
    return data


def _number(data: bytes, at: int, size: int) -> int:
    return int.from_bytes(data[at : at + size])


def _associate(data: bytes, at: int, properties: dict[int, list[int]], parts: Count) -> None:
    """Read which properties each item has: an ``ipma`` box whose content starts at ``at``."""
    wide, size = 4 if data[at] else 2, 1 + data[at + 3] % 2
    count, at = _number(data, at + 4, 4), at + 8
    for _ in range(count):
        item, few, at = _number(data, at, wide), data[at + wide], at + wide + 1
        parts.add(1 + few)
        bits = 8 * size - 1  # the highest bit tells whether it is essential
        properties[item] += [_number(data, at + size * i, size) % 2**bits for i in range(few)]
        at += size * few


def _check_cost(pixels: dict[int, int], sources: dict[int, list[int]], limit: int) -> None:
    """Reject items that are derived from more pixels than the picture needs."""
    costs = pixels
    for _ in range(MAX_ITEM_DEPTH):
        before = costs
        costs = {
            item: pixels.get(item, 0) + sum(before.get(source, 0) for source in sources[item])
            for item in {*pixels, *sources}
        }
        if max(costs.values(), default=0) > limit:
            raise too_large("pixels in items", max(costs.values()), limit)
        if costs == before:
            return
    raise too_large("levels of derived items", MAX_ITEM_DEPTH, MAX_ITEM_DEPTH - 1)
