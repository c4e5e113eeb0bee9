"""Sketches of training files, by which a folder is recognised whatever its name is.

A sketch is the smallest hashes of a set, which are a random sample of it: Broder, "On the
resemblance and containment of documents", 1997. A folder that holds a share s of the training files
has none of the :data:`SIZE` sketched ones with probability ``(1 - s) ** SIZE``: 0.6 % for s = 2 %.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ade_base.files import read_file
from training.data import Dataset
from training.datasets.files import check_storage, is_transient, read_again

SIZE = 256
KEY = "sketch"  # in a record of data
VERSION = "files_version"  # in a checkpoint, of the files that its sketch is of
ESCAPE = "surrogateescape"  # names need not be UTF-8
HASH_DIGITS = 16  # of a file's SHA-256
_HASH = re.compile(f"[0-9a-f]{{{HASH_DIGITS}}}")


def record_of(dataset: Dataset, earlier: Iterable[str] = ()) -> dict[str, Any]:
    """What a checkpoint, a manifest or an encoder's file records of the data it was trained on.

    Args:
        dataset: that the network is trained on.
        earlier: the sketch of what it was trained on before it was resumed.

    Returns:
        ``name`` and ``splits``; for a folder of files also ``sketch``, the :data:`SIZE` smallest
        hashes of the files of the part ``train``, of all of them if they are fewer. With
        ``earlier`` it is the sketch of the files of both.

    Raises:
        DataError: a file cannot be read.
    """
    record: dict[str, Any] = {"name": dataset.name, "splits": dataset.splits}
    hashes = {*earlier, *_smallest_hashes(dataset)}
    if hashes:
        record[KEY] = sorted(hashes)[:SIZE]
    return record


def _smallest_hashes(dataset: Dataset) -> list[str]:
    """Of the training files; each data set's files, which may be many, are read only once."""
    if dataset.folder is None:
        return []
    known = vars(dataset)  # a frozen dataclass that cannot be hashed: kept as a cached_property is
    if "_smallest_hashes" not in known:
        # With an incomplete sketch, training files could calibrate a gate later.
        paths = (dataset.folder / name for name in dataset.files["train"])
        hashes = {_hash_of(read_again(path)) for path in paths}
        known["_smallest_hashes"] = sorted(hashes)[:SIZE]
    found: list[str] = known["_smallest_hashes"]
    return found


def version_of(dataset: Dataset) -> str:
    """A digest of the names, sizes and times of the training files; empty if it has no files.

    It is another one if files are replaced under their names. Looking at files takes no time,
    unlike reading them.
    """
    if dataset.folder is None:
        return ""
    digest = hashlib.sha256()
    for name in dataset.files["train"]:
        with suppress(OSError):
            about = (dataset.folder / name).stat()
            digest.update(f"{name}\0{about.st_size}\0{about.st_mtime_ns}\n".encode(errors=ESCAPE))
    return digest.hexdigest()


def sketch_in(record: Mapping[str, Any]) -> list[str] | None:
    """The sketch in a record; ``None`` if it has none or a damaged one, which would match nothing.

    Records of older versions and of data sets that are not folders of files have none.
    """
    sketch = record.get(KEY)
    if not isinstance(sketch, list) or not sketch:
        return None
    return sketch if all(isinstance(h, str) and _HASH.fullmatch(h) for h in sketch) else None


def file_hashes(paths: Sequence[Path]) -> Iterator[tuple[Path, str]]:
    """The first 8 bytes of the SHA-256 of each file, as 16 digits; leaves out unreadable files.

    Raises:
        DataError: more than a few files cannot be read now.
    """
    failed: dict[str, str] = {}
    for path in paths:
        try:
            yield path, _hash_of(read_file(path))
        except OSError as error:
            if is_transient(error, path):
                failed[str(path)] = error.strerror or str(error)
    check_storage(failed, len(paths))


def _hash_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:HASH_DIGITS]
