"""Small files that take gigabytes or minutes to decode without the limits.

None has more than 16 MiB, and only those named after their pixels claim more of them than are
allowed, so the simple limits do not reject them. :data:`HARMLESS` names those that are decoded,
because they cost no more than other images of their size.

``python -m tests.bombs NAME…`` decodes each in a process of its own and prints its cost as JSON.
"""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import struct
import sys
import time
import zlib
from collections.abc import Callable

from PIL import Image

from ade_base.pictures import decoders
from ade_base.pictures.limits import ImageError
from ade_base.pictures.read import file_size, read_image
from tests.bomb_files import (
    MIB,
    animation,
    bmp_delta,
    chunk,
    directory,
    exif_in,
    exif_of_tags,
    gif_with,
    grey,
    jpeg,
    jpeg_frame,
    jpeg_of_many_scans,
    jpeg_of_stated_size,
    loop_of_directories,
    of_stated_size,
    png,
    raw_profile,
    saved,
    segment,
    tiff,
    tiff_of_strips,
    tiff_of_tags,
    tiff_of_tiles,
    tiff_of_two_kinds,
    tiff_tile,
    webp,
    webp_of_codes,
)
from tests.boxes import box, boxes_in_boxes, grid_of, heic_of_one_tile, still

BOMBS: dict[str, Callable[[], bytes]] = {
    "avif-pixels": lambda: still(b"avif", sizes={1: (16_000, 12_500)}),
    "avif-exif-tags": lambda: exif_in("AVIF"),
    "avif-coded-4000x4000": lambda: of_stated_size("AVIF", 4000, 4000),
    "avif-items": lambda: still(
        b"avif",
        box(
            b"iloc",
            bytes(6),
            struct.pack(">H", 65_535),
            b"".join(struct.pack(">HHH", item, 0, 0) for item in range(65_535)),
        ),
    ),
    "avif-boxes": lambda: still(b"avif") + box(b"free") * 1_900_000,
    "avif-boxes-in-boxes": lambda: still(b"avif", boxes_in_boxes(3000)),
    "avif-metadata": lambda: still(b"avif", box(b"idat", bytes(15 * MIB))),
    "avif-properties": lambda: still(
        b"avif", box(b"iprp", box(b"ipma", struct.pack(">II", 0, 2**32 - 1), bytes(MIB)))
    ),
    "avif-frames": lambda: animation("AVIF", 100),
    "avif-4000x4000": lambda: saved(
        grey(4000, 4000, "RGBA"), "AVIF", speed=10, subsampling="4:4:4"
    ),
    "heic-pixels": lambda: still(b"heic", sizes={1: (16_000, 12_500)}),
    "heic-sequence": lambda: still(b"msf1") + box(b"moov", bytes(100)),
    "heic-tiles": lambda: grid_of({1: [2] * 5000}, {2: (1024, 1024)}),
    "heic-large-tile": lambda: grid_of({1: [2]}, {2: (8000, 6000)}),
    "heic-grids-in-grids": lambda: grid_of(
        {item: [item + 1] * 2 for item in range(1, 40)}, dict.fromkeys(range(2, 41), (32, 32))
    ),
    "heic-grid-of-itself": lambda: grid_of({1: [1]}, {}),
    "heic-exif-tags": lambda: exif_in("HEIF"),
    "heic-coded-2000x2000": lambda: of_stated_size("HEIF", 2000, 2000),
    "heic-8192x6144": lambda: heic_of_one_tile(
        saved(grey(1024, 1024), "HEIF", quality=10), 1024, 8192, 6144
    ),
    "jpeg-pixels": lambda: jpeg_of_stated_size(16_000, 12_500),
    "jpeg-wide": lambda: jpeg_of_stated_size(51_000, 1000),
    "jpeg-large-scans": lambda: jpeg_of_many_scans(8192, 6144, 45),
    "jpeg-8192x6144": lambda: saved(
        grey(8192, 6144), "JPEG", progressive=True, subsampling=0, quality=95
    ),
    "jpeg-two-frames": lambda: jpeg(jpeg_frame(4000, 32)),
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
    "tiff-two-kinds": tiff_of_two_kinds,
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
if importlib.util.find_spec("pillow_heif") is None:
    BOMBS = {name: make for name, make in BOMBS.items() if not name.startswith("heic")}
HARMLESS = BOMBS.keys() & {
    "avif-coded-4000x4000",  # libavif resizes it
    "avif-frames",
    "avif-4000x4000",
    "avif-exif-tags",
    "heic-exif-tags",
    "heic-8192x6144",
    "jpeg-8192x6144",
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
# Bombs that were measured on the service without limits, and the limit that must refuse each.
REASONS = {
    "bmp-rle-delta": "must be uncompressed",
    "tiff-tags": "tags in a directory",
    "png-exif-tags": "tags in a directory",
    "webp-exif-tags": "tags in a directory",
    "jpeg-exif-tags": "tags in a directory",
    "gif-comment": "bytes of comments",
    "jpeg-scans": "100 scans",
    "tiff-tile": "tiles not larger than the image",
    "tiff-two-kinds": "one integer in tag 262",
    "jpeg-two-frames": "has two frames",
    "tiff-tiles-beyond": "pixels in tiles",
    "tiff-strips": "strips or tiles",
    "tiff-strips-of-1x64K": "strips or tiles",
    "png-iccps": "colour profiles",
    "webp-codes": "bytes of lossless pixels",
    "png-ztxt": "used in text chunks",
    "avif-pixels": "at most 16000000 pixels, this one has 16000 x 12500",
    "avif-items": "10000 boxes, items and references",
    "avif-boxes": "10000 boxes, items and references",
    "avif-metadata": "bytes of metadata",
    "avif-properties": "10000 boxes, items and references",
    "jpeg-pixels": "at most 51000000 pixels, this one has 16000 x 12500",
    "jpeg-wide": "at most 16000000 pixels, this one has 51000 x 1000",
    "jpeg-large-scans": "31 scans of its size",
    "heic-pixels": "at most 51000000 pixels, this one has 16000 x 12500",
    "heic-sequence": "must be a still image",
    "heic-tiles": "pixels in items",
    "heic-large-tile": "pixels in items",
    "heic-grids-in-grids": "levels of derived items",
    "heic-grid-of-itself": "levels of derived items",
}


def _mebibytes(field, process="self"):
    with open(f"/proc/{process}/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def _cpu_seconds(process):
    with open(f"/proc/{process}/stat") as line:
        return sum(map(int, line.read().rsplit(")", 1)[1].split()[11:13])) / os.sysconf(
            "SC_CLK_TCK"
        )


def measure(name):
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
