"""One class of LSUN from its LMDB; an unpacked one is a folder like any other."""

from __future__ import annotations

import json
from pathlib import Path

from training.data import DataError, Dataset
from training.datasets.files import Report, cached_pixels, decode_into, split_by_name

DEFAULT_SIZE = 64


def load_lsun(root: Path, image_size: int | None, cache: Path | None, report: Report) -> Dataset:
    """The images of a folder such as ``bedroom_train_lmdb``, split by the hash of their keys.

    Raises:
        DataError: it is no LMDB, or an empty one.
    """
    try:
        import lmdb
    except ImportError as error:
        raise DataError("LSUN's LMDB needs the package lmdb: pip install 'av-ade[train]'") from error
    size = image_size or DEFAULT_SIZE
    if not (root / "data.mdb").is_file():
        raise DataError(f"{root} is no LMDB: it holds no data.mdb (for a folder of image files: --data {root}, no --root)")
    try:
        environment = lmdb.open(str(root), readonly=True, lock=False, readahead=False, create=False)
        with environment.begin() as transaction:
            keys = [bytes(key) for key in transaction.cursor().iternext(keys=True, values=False)]
    except lmdb.Error as error:
        raise DataError(f"{root} cannot be read as an LMDB: {error}") from error
    if not keys:
        raise DataError(f"{root} holds no images")

    def value(key: bytes) -> bytes:
        with environment.begin() as transaction:
            return bytes(transaction.get(key) or b"")

    stat = (root / "data.mdb").stat()
    pixels, skipped = cached_pixels(json.dumps([size, stat.st_size, stat.st_mtime_ns]), lambda: (len(keys), size, size, 3),
                                    cache, lambda out: decode_into(out, size, keys, value, report))
    environment.close()
    return split_by_name(f"lsun-{root.name.removesuffix('_lmdb')}", [key.decode(errors="replace") for key in keys], pixels,
                         skipped, report)
