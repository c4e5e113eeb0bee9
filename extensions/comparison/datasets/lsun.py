"""A class of LSUN from its LMDB. An unpacked class is loaded as a folder of images."""

from __future__ import annotations

import dataclasses
import errno
import json
import struct
from pathlib import Path

import numpy as np

from training.data import DataError, Dataset, Report
from training.datasets.files import cached_pixels, decode_into, split_by_name

DEFAULT_SIZE = 64
# Each of the first two pages of an LMDB describes it, and the newer one is valid: a magic number,
# the page size, the number of the last page and that of the transaction (lmdb's mdb.c: MDB_page,
# MDB_meta).
_META = struct.Struct("=16xI20xI92xQQ")
_MAGIC = 0xBEEFC0DE


def load_lsun(root: Path, image_size: int | None, cache: Path | None, report: Report) -> Dataset:
    """Load the images of a folder such as ``bedroom_train_lmdb``, split by hashes of their keys.

    Raises:
        DataError: the folder is not an LMDB, or an empty or damaged one.
    """
    try:
        import lmdb
    except ImportError as error:
        raise DataError("reading LSUN's LMDB needs the package lmdb: pip install lmdb") from error
    size = image_size or DEFAULT_SIZE
    if not (root / "data.mdb").is_file():
        raise DataError(
            f"{root} is not an LMDB, since it holds no data.mdb; "
            "if it holds image files, give it as the data set itself, without a root"
        )
    _check_length(root / "data.mdb")
    try:
        environment = lmdb.open(str(root), readonly=True, lock=False, readahead=False, create=False)
        with environment.begin() as transaction:
            keys = [bytes(key) for key in transaction.cursor().iternext(keys=True, values=False)]
    except lmdb.Error as error:
        raise DataError(f"{root} cannot be read as an LMDB: {error}") from error
    if not keys:
        raise DataError(f"{root} holds no images")

    def value(key: bytes) -> bytes:
        try:
            with environment.begin() as transaction:
                return bytes(transaction.get(key) or b"")
        except lmdb.Error as error:
            raise OSError(errno.EINVAL, f"the LMDB is damaged: {error}") from error

    def fill(out: np.ndarray) -> tuple[dict[int, str], bool]:
        skipped, passing = decode_into(out, size, keys, value, report)
        return skipped, not passing

    stat = (root / "data.mdb").stat()
    pixels, skipped = cached_pixels(
        json.dumps(["lsun", root.name, size]),
        json.dumps([stat.st_size, stat.st_mtime_ns]),
        lambda: (len(keys), size, size, 3),
        cache,
        fill,
    )
    environment.close()
    dataset = split_by_name(
        f"lsun-{root.name.removesuffix('_lmdb')}",
        [key.decode(errors="replace") for key in keys],
        pixels,
        skipped,
        report,
    )
    # Their shorter sides have 256 pixels.
    return dataclasses.replace(dataset, is_resized=True)


def _check_length(path: Path) -> None:
    """Check that a database is complete: to read a mapped page beyond its end kills the process.

    Raises:
        DataError: the file is truncated, or is not an LMDB.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        first = file.read(_META.size)
        magic, page, *_ = _META.unpack(first.ljust(_META.size, b"\0"))
        file.seek(page)
        metas = [first, file.read(_META.size)]
    if magic != _MAGIC or len(metas[1]) < _META.size:
        raise DataError(f"{path} is not an LMDB")
    _, _, last, _ = max((_META.unpack(meta) for meta in metas), key=lambda fields: fields[3])
    if size < (last + 1) * page:
        raise DataError(f"{path} is truncated: it has {size} of {(last + 1) * page} bytes")
