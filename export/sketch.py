"""Sketches of training files, by which a folder is recognised whatever its name is.

A sketch is the smallest hashes of a set, which are a random sample of it: Broder, "On the
resemblance and containment of documents", 1997. A folder that holds a share s of the training files
has none of the :data:`SIZE` sketched ones with probability ``(1 - s) ** SIZE``: 0.6 % for s = 2 %.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from serving.engine.bundle import Bundle
from serving.files import read_file
from training.data import Dataset

SIZE = 256
KEY = "sketch"  # in a record of data
HASH_DIGITS = 16  # of a file's SHA-256
_HASH = re.compile(f"[0-9a-f]{{{HASH_DIGITS}}}")


def record_of(dataset: Dataset) -> dict[str, Any]:
    """What a manifest or an encoder's file records of the data set that a network was trained on.

    Returns:
        ``name`` and ``splits``; for a folder of files also ``sketch``, the :data:`SIZE` smallest
        hashes of the files of the part ``train``, of all of them if they are fewer.
    """
    record: dict[str, Any] = {"name": dataset.name, "splits": dataset.splits}
    if dataset.folder is not None:
        paths = [dataset.folder / name for name in dataset.files["train"]]
        hashes = {file_hash for _, file_hash in file_hashes(paths)}
        if hashes:
            record[KEY] = sorted(hashes)[:SIZE]
    return record


def sketch_in(record: Mapping[str, Any]) -> list[str] | None:
    """The sketch in a record; ``None`` if it has none or a damaged one, which would match nothing.

    Records of older versions and of data sets that are not folders of files have none.
    """
    sketch = record.get(KEY)
    if not isinstance(sketch, list) or not sketch:
        return None
    return sketch if all(isinstance(h, str) and _HASH.fullmatch(h) for h in sketch) else None


def file_hashes(paths: Sequence[Path]) -> Iterator[tuple[Path, str]]:
    """The first 8 bytes of the SHA-256 of each file, as 16 digits; leaves out unreadable files."""
    for path in paths:
        with suppress(OSError):
            yield path, hashlib.sha256(read_file(path)).hexdigest()[:HASH_DIGITS]


def sketched(bundle: Bundle) -> set[str]:
    """Hashes of files that trained the model or the network of features, as far as known."""
    records = (*data_of_model(bundle), data_of_features(bundle) or {})
    return {file_hash for record in records for file_hash in sketch_in(record) or ()}


def data_of_model(bundle: Bundle) -> list[Mapping[str, Any]]:
    """Describes the data set of a bundle's model, and those of the models it was started from."""
    records: list[Mapping[str, Any]] = [bundle.manifest["data"]]
    ancestors = [bundle.manifest.get("training") or {}]
    while ancestors:
        one = ancestors.pop()
        ancestors += filter(None, (one.get("started_from"), one.get("flow_from")))
        if "data" not in one or "splits" not in one:  # the model itself, or of an older version
            continue
        record = {key: one[key] for key in ("splits", KEY) if key in one} | {"name": one["data"]}
        # Without a sketch of its own, the same data set is known by that of a later model.
        if not any(record.items() <= known.items() for known in records):
            records.append(record)
    return records


def data_of_features(bundle: Bundle) -> Mapping[str, Any] | None:
    """Describes the data set of a bundle's network of features; ``None`` if unknown."""
    found: Mapping[str, Any] | None = (bundle.manifest.get("features") or {}).get("data")
    return found
