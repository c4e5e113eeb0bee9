"""Small files that take gigabytes or minutes to decode without the limits.

None has more than 16 MiB or claims more than 16 million pixels, so the simple limits do not reject
them. :data:`HARMLESS` names those that are decoded, because they cost no more than other images of
their size.

``python -m tests.bombs NAME…`` decodes each in a process of its own and prints its cost as JSON.
"""

from __future__ import annotations

import io
import json
import os
import resource
import struct
import sys
import time
import zlib
from collections.abc import Callable
from typing import Any

from PIL import Image

from ade_base.pictures import decoders
from ade_base.pictures.limits import ImageError
from ade_base.pictures.read import file_size, read_image

MIB = 2**20


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    *extra: bytes,
    width: int = 32,
    height: int = 32,
    depth: int = 8,
    colours: int = 2,
    after: bytes = b"",
) -> bytes:
    """A black PNG with further chunks before its pixels, and after them."""
    samples = {0: 1, 2: 3, 4: 2, 6: 4}[colours] * depth // 8
    compressor = zlib.compressobj(9)
    missing = (1 + samples * width) * height
    pixels = b""
    while missing:
        pixels += compressor.compress(bytes(min(missing, 8 * MIB)))
        missing -= min(missing, 8 * MIB)
    pixels += compressor.flush()
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0))
        + b"".join(extra)
        + chunk(b"IDAT", pixels)
        + after
        + chunk(b"IEND", b"")
    )


def directory(
    entries: int, size: int, order: str = "<", first: tuple[tuple[int, int, int, int], ...] = ()
) -> bytes:
    """A TIFF whose tags are all the same bytes: each reader copies them for every tag."""
    tags = [*first, *((0x9C00 + i, 7, size, 0) for i in range(entries))]
    return (
        (b"II*\0" if order == "<" else b"MM\0*")
        + struct.pack(order + "IH", 8, len(tags))
        + b"".join(struct.pack(order + "HHII", *tag) for tag in tags)
        + bytes(4)
    )


def tiff(tags: dict[int, tuple[int, int, int]], data: bytes = b"") -> bytes:
    """A TIFF of tags (type, count, value or offset), with data right after them."""
    every = {
        256: (4, 1, 32),
        257: (4, 1, 32),
        258: (3, 1, 8),
        259: (3, 1, 1),
        262: (3, 1, 1),
        277: (3, 1, 1),
        **tags,
    }
    return (
        b"II*\0"
        + struct.pack("<IH", 8, len(every))
        + b"".join(struct.pack("<HHII", tag, *every[tag]) for tag in sorted(every))
        + bytes(4)
        + data
    )


def saved(image: Image.Image, format: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def grey(width: int = 32, height: int = 32, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (width, height), "grey")


def segment(kind: int, data: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, kind, len(data) + 2) + data


def jpeg(*segments: bytes) -> bytes:
    """A JPEG with further segments before its own."""
    return b"\xff\xd8" + b"".join(segments) + saved(grey(), "JPEG")[2:]


def jpeg_of_many_scans() -> bytes:
    """A progressive JPEG whose last scan is repeated; each scan visits all blocks."""
    data = saved(grey(4000, 3900, "L"), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * ((300_000 - len(data)) // (len(data) - last)) + b"\xff\xd9"


def webp(kind: bytes, data: bytes, flags: int = 8) -> bytes:
    """A WebP with a chunk of metadata."""
    picture = saved(grey(), "WEBP", lossless=True)[12:]
    body = b"WEBPVP8X" + struct.pack("<IB3x", 10, flags) + bytes([31, 0, 0, 31, 0, 0]) + picture
    body += kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def gif_with(extensions: bytes, width: int = 32, height: int = 32) -> bytes:
    """A GIF with further blocks before its frame."""
    data = saved(grey(width, height, "L"), "GIF")
    start = 13 + (6 << (data[10] & 7))
    return data[:start] + extensions + data[start:]


def animation(format: str, frames: int) -> bytes:
    pictures = [Image.new("RGB", (32, 32), (i % 256, i // 256, 0)) for i in range(frames)]
    return saved(pictures[0], format, save_all=True, append_images=pictures[1:])


def bmp_delta() -> bytes:
    """A BMP in RLE8 of 16,000,000 x 1 whose jumps skip rows as long as the picture."""
    palette = b"".join(bytes([i, i, i, 0]) for i in range(256))
    head = struct.pack("<IiiHHIIiiII", 40, 16_000_000, 1, 1, 8, 1, 0, 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 1084, 0, 0, 54 + 1024) + head + palette + b"\0\2\0\xff\0\1"


def tiff_of_tags(size: int = MIB, entries: int = 3000) -> bytes:
    strip = (
        (256, 4, 1, 32),
        (257, 4, 1, 32),
        (258, 3, 1, 8),
        (262, 3, 1, 1),
        (273, 4, 1, 8),
        (277, 3, 1, 1),
        (278, 4, 1, 32),
        (279, 4, 1, 1024),
    )
    return directory(entries, size - 100, first=strip).ljust(size, b"\0")


def exif_of_tags(size: int, entries: int = 3000) -> bytes:
    return directory(entries, size - 100).ljust(size, b"\0")


def loop_of_directories() -> bytes:
    """A TIFF whose next directory is itself, and whose EXIF too."""
    data = tiff(
        {273: (4, 1, 0), 278: (4, 1, 32), 279: (4, 1, 1024), 0x8769: (4, 1, 8)}, bytes(1024)
    )
    next_at = 10 + 12 * 10
    return data[:next_at] + struct.pack("<I", 8) + data[next_at + 4 :]


def tiff_tile() -> bytes:
    """A TIFF of 32 x 32 in one tile of 30,000 x 30,000."""
    packed = zlib.compress(bytes(1024))
    return tiff(
        {
            259: (3, 1, 8),
            322: (4, 1, 30_000),
            323: (4, 1, 30_000),
            324: (4, 1, 148),
            325: (4, 1, len(packed)),
        },
        bytes(20) + packed,
    )


def tiff_of_tiles(width: int, height: int, across: int, down: int) -> bytes:
    """A black TIFF in tiles that are all the same bytes."""
    packed = zlib.compress(bytes(across * down), 9)
    count = -(-width // across) * -(-height // down)
    offsets = 134  # after ten tags
    places = struct.pack("<I", offsets + 8 * count) * count
    lengths = struct.pack("<I", len(packed)) * count
    return tiff(
        {
            256: (4, 1, width),
            257: (4, 1, height),
            259: (3, 1, 8),
            322: (4, 1, across),
            323: (4, 1, down),
            324: (4, count, offsets),
            325: (4, count, offsets + 4 * count),
        },
        places + lengths + packed,
    )


def tiff_of_strips(count: int = 2_000_000) -> bytes:
    """A TIFF with a strip of no rows for every four bytes."""
    return tiff({273: (4, count, 300), 278: (4, 1, 1), 279: (4, 1, 32)}, bytes(300 + 4 * count))


def raw_profile(size: int) -> bytes:
    """EXIF as ImageMagick writes it into a PNG's text, here of tags that share their bytes."""
    text = b"\nexif\n%8d\n" % size + exif_of_tags(size).hex().encode()
    return chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text))


def webp_of_codes(side: int) -> bytes:
    """A lossless WebP with 65,536 groups of prefix codes, of which all pixels use the last."""
    text = ""

    def put(value: int, bits: int) -> None:
        nonlocal text
        text += format(value, f"0{bits}b")[::-1]

    put(0x2F, 8)
    put(side - 1, 14)
    put(side - 1, 14)
    put(0, 5)  # no alpha, version 0, no transform
    put(1 | 11 << 1 | 1 << 5, 9)  # a colour cache; groups for blocks of 4x4 pixels
    put(0, 1)
    for symbol in (255, 255, 0, 0):  # the picture of groups has one colour, of the last group
        put(0b101, 3)
        put(symbol, 8)
    put(0b0001, 4)
    text += "1000" * 5 * 2**16
    text += "0" * (-len(text) % 16)
    body = bytes(int(text[i : i + 8][::-1], 2) for i in range(0, len(text), 8))
    head = struct.pack("<4sI4s4sI", b"RIFF", len(body) + 12, b"WEBP", b"VP8L", len(body))
    return head + body


BOMBS: dict[str, Callable[[], bytes]] = {
    "webp-codes": lambda: webp_of_codes(32),
    "bmp-rle-delta": bmp_delta,
    "bmp-jpeg": lambda: bmp_delta()[:30] + struct.pack("<I", 4) + bmp_delta()[34:],
    "bmp-header": lambda: b"BM" + bytes(12) + struct.pack("<I", 0xFFFFFFFF) + bytes(MIB),
    "bmp-1-bit": lambda: saved(Image.new("1", (4000, 4000)), "BMP"),
    "bmp-colours": lambda: (
        saved(Image.new("P", (32, 32)), "BMP")[:46]
        + struct.pack("<I", 65536)
        + saved(Image.new("P", (32, 32)), "BMP")[50:]
        + bytes(2**18)
    ),
    "tiff-tags": tiff_of_tags,
    "tiff-exif-tags": lambda: tiff(
        {273: (4, 1, 0), 278: (4, 1, 32), 279: (4, 1, 1024), 0x8769: (4, 1, 200)},
        bytes(200 - 134) + directory(3000, MIB - 200)[8:].ljust(MIB, b"\0"),
    ),
    "tiff-loop": loop_of_directories,
    "tiff-tile": tiff_tile,
    "tiff-tiles-beyond": lambda: tiff_of_tiles(8000, 1, 16, 2**16),
    "tiff-strips": tiff_of_strips,
    "tiff-strips-of-1x16M": lambda: tiff(
        {
            256: (4, 1, 1),
            257: (4, 1, 4_000_000),
            273: (4, 4_000_000, 200),
            278: (4, 1, 1),
            279: (4, 1, 1),
        },
        bytes(200 + 16_000_000),
    ),
    "tiff-strips-of-1x64K": lambda: tiff(
        {256: (4, 1, 1), 257: (4, 1, 2**16), 273: (1, 2**16, 200), 278: (4, 1, 1)},
        bytes(90) + b"\x08" * 2**16,
    ),
    "tiff-deflate": lambda: saved(
        Image.new("RGBA", (4000, 4000)), "TIFF", compression="tiff_adobe_deflate"
    ),
    "tiff-lzw": lambda: saved(Image.new("CMYK", (4000, 4000)), "TIFF", compression="tiff_lzw"),
    "tiff-group4": lambda: saved(Image.new("1", (4000, 4000)), "TIFF", compression="group4"),
    "tiff-jpeg": lambda: saved(Image.new("RGB", (3000, 3000)), "TIFF", compression="jpeg"),
    "tiff-pages": lambda: animation("TIFF", 500),
    "png-exif-tags": lambda: png(chunk(b"eXIf", exif_of_tags(MIB))),
    "png-exif-after": lambda: png(after=chunk(b"eXIf", exif_of_tags(MIB))),
    "png-exif-text": lambda: png(chunk(b"tEXt", b"exif\0" + exif_of_tags(65_000))),
    "png-raw-profile": lambda: png(raw_profile(400_000)),
    "png-exif-prefixes": lambda: png(chunk(b"eXIf", b"Exif\0\0" * 600_000)),
    "png-iccp": lambda: png(chunk(b"iCCP", b"icc\0\0" + zlib.compress(bytes(200 * MIB), 9))),
    "png-iccps": lambda: png(*[chunk(b"iCCP", b"icc\0\0" + zlib.compress(bytes(MIB), 9))] * 200),
    "png-ztxt": lambda: png(
        *[chunk(b"zTXt", b"k%d\0\0" % i + zlib.compress(bytes(MIB), 9)) for i in range(63)]
    ),
    "png-itxt": lambda: png(*[chunk(b"iTXt", b"k\0\1\0\0\0" + zlib.compress(bytes(MIB), 9))] * 200),
    "png-text": lambda: png(chunk(b"tEXt", b"k\0" + bytes(15 * MIB))),
    "png-chunks": lambda: png(chunk(b"tEXt", b"") * 1_300_000),
    "png-idats": lambda: png(after=chunk(b"IDAT", b"") * 1_300_000),
    "png-frames": lambda: animation("PNG", 1000),
    "png-frame-count": lambda: png(
        chunk(b"acTL", struct.pack(">II", 0x7FFFFFFF, 0)),
        chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, 32, 32, 0, 0, 1, 1, 0, 0)),
    ),
    "png-16-bit-alpha": lambda: png(width=4000, height=4000, depth=16, colours=6),
    "png-1x16M": lambda: png(width=1, height=16_000_000, colours=0),
    "png-16Mx1": lambda: png(width=16_000_000, height=1, colours=6),
    "jpeg-exif-tags": lambda: jpeg(
        segment(0xE1, b"Exif\0\0" + exif_of_tags(65_000)),
        *[segment(0xE1, b"Exif\0\0" + bytes(65_000))] * 20,
    ),
    "jpeg-exif-segments": lambda: jpeg(*[segment(0xE1, b"Exif\0\0" + bytes(400))] * 9_000),
    "jpeg-exif-behind-end": lambda: jpeg(
        b"\xff\xd9", segment(0xE1, b"Exif\0\0" + exif_of_tags(65_000))
    ),
    "jpeg-mpf-tags": lambda: jpeg(segment(0xE2, b"MPF\0" + exif_of_tags(65_000))),
    "jpeg-scans": jpeg_of_many_scans,
    "jpeg-segments": lambda: jpeg(segment(0xE5, b"") * 4_000_000),
    "jpeg-app": lambda: jpeg(*[segment(0xE5, bytes(65_000))] * 250),
    "jpeg-tables": lambda: jpeg(*[segment(0xDB, (b"\0" + b"\1" * 64) * 1000)] * 250),
    "jpeg-fill": lambda: jpeg(b"\xff" * (15 * MIB)),
    "jpeg-junk": lambda: jpeg(segment(0xE5, b"") + bytes(15 * MIB)),
    "jpeg-65500x244": lambda: saved(grey(65_500, 244), "JPEG", progressive=True),
    "jpeg-restarts": lambda: saved(grey(4000, 3900, "L"), "JPEG", restart_marker_blocks=1),
    "jpeg-cmyk": lambda: saved(
        Image.new("CMYK", (4000, 3900)), "JPEG", progressive=True, subsampling=0
    ),
    "gif-comment": lambda: gif_with(
        b"!\xfe" + (b"\xff" + bytes(range(1, 256))) * (7 * MIB // 256) + b"\0"
    ),
    "gif-comments": lambda: gif_with((b"!\xfe\1x\0") * (7 * MIB // 5)),
    "gif-application": lambda: gif_with(b"!\xff\x0bNETSCAPE2.0" + b"\1x" * (7 * MIB) + b"\0"),
    "gif-blocks": lambda: saved(grey(32, 32, "L"), "GIF")[:-2] + b"\1x" * (7 * MIB) + b"\0;",
    "gif-junk": lambda: gif_with(b"j" * (15 * MIB)),
    "gif-frames": lambda: animation("GIF", 1000),
    "gif-screen": lambda: gif_with(b"")[:6] + struct.pack("<HH", 65_000, 246) + gif_with(b"")[10:],
    "gif-4000x4000": lambda: saved(Image.new("P", (4000, 4000)), "GIF", transparency=0),
    "webp-exif-tags": lambda: webp(b"EXIF", exif_of_tags(MIB)),
    "webp-xmp": lambda: webp(b"XMP ", bytes(15 * MIB), flags=4),
    "webp-chunks": lambda: webp(b"none", b"")[:-8] + b"none\0\0\0\0" * 1_900_000,
    "webp-frames": lambda: animation("WEBP", 500),
    "webp-4000x4000": lambda: saved(Image.new("RGBA", (4000, 4000)), "WEBP", lossless=True),
}
HARMLESS = {
    "bmp-1-bit",
    "tiff-deflate",
    "tiff-lzw",
    "tiff-pages",
    "png-frames",
    "png-frame-count",
    "png-16-bit-alpha",
    "png-1x16M",
    "png-16Mx1",
    "jpeg-65500x244",
    "jpeg-restarts",
    "jpeg-cmyk",
    "gif-frames",
    "gif-screen",
    "gif-4000x4000",
    "webp-frames",
    "webp-4000x4000",
}


def _mebibytes(field: str, process: int | str = "self") -> float:
    with open(f"/proc/{process}/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def _cpu_seconds(process: int) -> float:
    with open(f"/proc/{process}/stat") as line:
        return sum(map(int, line.read().rsplit(")", 1)[1].split()[11:13])) / os.sysconf(
            "SC_CLK_TCK"
        )


def measure(name: str) -> dict[str, Any]:
    """Decode one bomb; returns the cost in this process and its children, with their start."""
    data = BOMBS[name]()
    before = _mebibytes("VmRSS")
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")
    started, cpu_started = time.monotonic(), time.process_time()
    file_size(data)
    header_seconds = time.process_time() - cpu_started
    try:
        outcome = f"decoded {read_image(data).pixels.shape}"
    except ImageError as error:
        outcome = f"{error.code}: {error}"
    seconds, cpu = time.monotonic() - started, time.process_time() - cpu_started
    used = _mebibytes("VmHWM") - before
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    used += ended.ru_maxrss / 1024
    cpu += ended.ru_utime + ended.ru_stime
    for decoder in decoders._idle:
        used += _mebibytes("VmHWM", decoder.pid)
        cpu += _cpu_seconds(decoder.pid)
    return {
        "name": name,
        "bytes": len(data),
        "seconds": round(seconds, 3),
        "cpu_seconds": round(cpu, 3),
        "header_cpu_seconds": round(header_seconds, 4),
        "MiB": round(used),
        "outcome": outcome,
    }


if __name__ == "__main__":
    for bomb in sys.argv[1:] or BOMBS:
        child = os.fork()
        if not child:
            print(json.dumps(measure(bomb)), flush=True)
            os._exit(0)
        os.waitpid(child, 0)
