"""Writes AVIF and HEIC files box by box."""

import struct

from ade_base.pictures.structure_heif import boxes


def box(kind, *contents):
    content = b"".join(contents)
    return struct.pack(">I4s", len(content) + 8, kind) + content


def still(brand, *described, sizes=None):
    """An AVIF or HEIC without data, whose items have sizes; item 1 is shown."""
    sizes = {1: (32, 32)} | (sizes or {})
    spread = [box(b"ispe", bytes(4), struct.pack(">II", *size)) for size in sizes.values()]
    entries = [struct.pack(">HBB", item, 1, 1 + i) for i, item in enumerate(sizes)]
    associations = box(b"ipma", struct.pack(">II", 0, len(sizes)), *entries)
    properties = box(b"iprp", box(b"ipco", *spread), associations)
    shown = box(b"pitm", bytes(4), b"\0\1")
    meta = box(b"meta", bytes(4), shown, properties, *described)
    return box(b"ftyp", brand, bytes(4), brand) + meta + box(b"mdat", bytes(100))


def grid_of(sources, sizes):
    """A HEIC of grids, each of other items."""
    references = [
        box(b"dimg", struct.pack(f">HH{len(to)}H", item, len(to), *to))
        for item, to in sources.items()
    ]
    return still(b"heic", box(b"iref", bytes(4), *references), sizes=sizes)


def boxes_in_boxes(depth):
    nested = b""
    for level in range(depth):
        nested = box((b"meta", b"iprp", b"ipco", b"iref")[level % 4], bytes(4), nested)
    return nested


def heic_of_one_tile(tile, side, width, height):
    """A HEIC that consists of the same tile, itself a HEIC, again and again."""
    (meta,) = (tile[a:b] for kind, a, b in boxes(tile, 0, len(tile)) if kind == b"meta")
    (data,) = (tile[a:b] for kind, a, b in boxes(tile, 0, len(tile)) if kind == b"mdat")
    codec = meta[meta.index(b"hvcC") - 4 :]
    codec = codec[: struct.unpack_from(">I", codec)[0]]
    rows, columns = -(-height // side), -(-width // side)

    def made(at):
        items = [
            box(b"infe", b"\2\0\0\0", struct.pack(">HH4sx", item, 0, kind))
            for item, kind in ((1, b"grid"), (2, b"hvc1"))
        ]
        places = [
            struct.pack(">HHHHII", 1, 1, 0, 1, 0, 8),
            struct.pack(">HHHHII", 2, 0, 0, 1, at, len(data)),
        ]
        sizes = [
            box(b"ispe", bytes(4), struct.pack(">II", *size))
            for size in ((width, height), (side, side))
        ]
        properties = box(
            b"iprp",
            box(b"ipco", *sizes, codec),
            box(b"ipma", struct.pack(">IIHBBHBBB", 0, 2, 1, 1, 1, 2, 2, 2, 3 | 128)),
        )
        return box(b"ftyp", b"heic", bytes(4), b"mif1heic") + box(
            b"meta",
            bytes(4),
            box(b"hdlr", bytes(8), b"pict", bytes(13)),
            box(b"pitm", bytes(4), b"\0\1"),
            box(b"iinf", bytes(4), struct.pack(">H", 2), *items),
            box(
                b"iref",
                bytes(4),
                box(b"dimg", struct.pack(">HH", 1, rows * columns) + b"\0\2" * (rows * columns)),
            ),
            properties,
            box(b"idat", struct.pack(">BBBBHH", 0, 0, rows - 1, columns - 1, width, height)),
            box(b"iloc", b"\1\0\0\0\x44\0", struct.pack(">H", 2), *places),
        )

    return made(len(made(0)) + 8) + box(b"mdat", data)
