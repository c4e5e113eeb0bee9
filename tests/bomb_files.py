"""Writes files that decoders read differently than other files, or at a high cost."""

import io
import struct
import zlib

from PIL import Image

from tests.boxes import box

MIB = 2**20


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*extra, width=32, height=32, depth=8, colours=2, after=b""):
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


def directory(entries, size, order="<", first=()):
    """A TIFF whose tags are all the same bytes: each reader copies them for every tag."""
    tags = [*first, *((0x9C00 + i, 7, size, 0) for i in range(entries))]
    return (
        (b"II*\0" if order == "<" else b"MM\0*")
        + struct.pack(order + "IH", 8, len(tags))
        + b"".join(struct.pack(order + "HHII", *tag) for tag in tags)
        + bytes(4)
    )


def tiff(tags, data=b""):
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


def saved(image, format, **options):
    out = io.BytesIO()
    if format == "HEIF":
        from pillow_heif import register_heif_opener

        register_heif_opener()
    image.save(out, format, **options)
    return out.getvalue()


def grey(width=32, height=32, mode="RGB"):
    return Image.new(mode, (width, height), "grey")


def segment(kind, data):
    return struct.pack(">BBH", 0xFF, kind, len(data) + 2) + data


def jpeg(*segments):
    """A JPEG with further segments before its own."""
    return b"\xff\xd8" + b"".join(segments) + saved(grey(), "JPEG")[2:]


def jpeg_frame(width, height):
    """The header of a frame in colour."""
    sides = struct.pack(">BHHB", 8, height, width, 3)
    return segment(0xC0, sides + b"\1\x11\0\2\x11\0\3\x11\0")


def jpeg_of_many_scans(width=4000, height=3900, times=250):
    """A progressive JPEG whose last scan is repeated; each scan visits all blocks."""
    data = saved(grey(width, height, "L"), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * times + b"\xff\xd9"


def jpeg_of_stated_size(width, height):
    """A grey JPEG of 32 x 32 whose header says more."""
    data = saved(grey(32, 32, "L"), "JPEG")
    stated = b"\xff\xc0\0\x0b\x08" + struct.pack(">HH", 32, 32)
    assert data.count(stated) == 1
    return data.replace(stated, stated[:5] + struct.pack(">HH", height, width))


def webp(kind, data, flags=8):
    """A WebP with a chunk of metadata."""
    picture = saved(grey(), "WEBP", lossless=True)[12:]
    body = b"WEBPVP8X" + struct.pack("<IB3x", 10, flags) + bytes([31, 0, 0, 31, 0, 0]) + picture
    body += kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def gif_with(extensions, width=32, height=32):
    """A GIF with further blocks before its frame."""
    data = saved(grey(width, height, "L"), "GIF")
    start = 13 + (6 << (data[10] & 7))
    return data[:start] + extensions + data[start:]


def animation(format, frames):
    pictures = [Image.new("RGB", (32, 32), (i % 256, i // 256, 0)) for i in range(frames)]
    return saved(pictures[0], format, save_all=True, append_images=pictures[1:])


def bmp_delta():
    """A BMP in RLE8 of 16,000,000 x 1 whose jumps skip rows as long as the picture."""
    palette = b"".join(bytes([i, i, i, 0]) for i in range(256))
    head = struct.pack("<IiiHHIIiiII", 40, 16_000_000, 1, 1, 8, 1, 0, 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 1084, 0, 0, 54 + 1024) + head + palette + b"\0\2\0\xff\0\1"


def tiff_of_tags(size=MIB, entries=3000):
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


def exif_of_tags(size, entries=3000):
    return directory(entries, size - 100).ljust(size, b"\0")


def loop_of_directories():
    """A TIFF whose next directory is itself, and whose EXIF too."""
    data = tiff(
        {273: (4, 1, 0), 278: (4, 1, 32), 279: (4, 1, 1024), 0x8769: (4, 1, 8)}, bytes(1024)
    )
    next_at = 10 + 12 * 10
    return data[:next_at] + struct.pack("<I", 8) + data[next_at + 4 :]


def tiff_tile():
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


def tiff_of_tiles(width, height, across, down):
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


def tiff_of_two_kinds(side=512):
    """A TIFF whose kind of colours is two numbers: of YCbCr for Pillow, of RGB for libtiff.

    Pillow 12 takes four bytes per pixel out of a tile with three.
    """
    packed = zlib.compress(bytes(3 * side**2))
    end = 10 + 12 * 10 + 4
    return tiff(
        {
            256: (4, 1, side),
            257: (4, 1, side),
            258: (3, 3, end),
            259: (3, 1, 8),
            262: (3, 2, 6 | 2 << 16),
            277: (3, 1, 3),
            322: (4, 1, side),
            323: (4, 1, side),
            324: (4, 1, end + 6),
            325: (4, 1, len(packed)),
        },
        struct.pack("<3H", 8, 8, 8) + packed,
    )


def tiff_of_strips(count=2_000_000):
    """A TIFF with a strip of no rows for every four bytes."""
    return tiff({273: (4, count, 300), 278: (4, 1, 1), 279: (4, 1, 32)}, bytes(300 + 4 * count))


def raw_profile(size):
    """EXIF as ImageMagick writes it into a PNG's text, here of tags that share their bytes."""
    text = b"\nexif\n%8d\n" % size + exif_of_tags(size).hex().encode()
    return chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text))


def webp_of_codes(side):
    """A lossless WebP with 65,536 groups of prefix codes, of which all pixels use the last."""
    text = ""

    def put(value, bits):
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


def exif_in(format, size=MIB):
    """An AVIF or HEIC with EXIF data of tags that share their bytes."""
    harmless = directory(1, 4).ljust(size, b"x")
    data = saved(grey(), format, exif=b"Exif\0\0" + harmless)
    assert data.count(harmless[8:]) == 1
    return data.replace(harmless[8:], exif_of_tags(size)[8:])


def of_stated_size(format, width, height):
    """An AVIF or HEIC of 32 x 32 pixels, whose coded picture has others."""
    data = saved(grey(width, height), format)
    stated = box(b"ispe", bytes(4), struct.pack(">II", width, height))
    assert stated in data
    return data.replace(stated, box(b"ispe", bytes(4), struct.pack(">II", 32, 32)))
