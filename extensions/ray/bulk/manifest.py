"""The list of files of a bulk run, written once in parts, so that a resumed run has the same."""

from __future__ import annotations

import json
import math
import os
import posixpath
import re
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from itertools import islice
from typing import Any

import fsspec
import pyarrow as pa
from pyarrow import parquet

from ade_base.messages import printable
from ade_base.pictures.read import is_image_name
from serving.bulk import BulkError

# Rows of a part, which is also what is committed at once: about 30 s of work for one worker.
PART_ROWS = 4096
SCHEMA = pa.schema(
    [
        ("id", pa.int64()),
        ("path", pa.string()),  # to be read: bytes that are not UTF-8 are escapes
        ("file", pa.binary()),  # the same path as it is, to be opened
        ("size", pa.int64()),
        ("mtime", pa.float64()),
    ]
)
SUFFIX = ".parquet"
_PART = re.compile(r"part-\d{8}\.parquet")
_TIMES = ("mtime", "LastModified", "last_modified", "updated")  # as file systems name it


def is_manifest(source: str) -> bool:
    return source.endswith(SUFFIX)


def file_system(path: str) -> tuple[Any, str]:
    """fsspec's file system of a path or URL, and the path within it.

    It has forgotten earlier listings: other processes write beside this one.

    Raises:
        BulkError: fsspec does not know the protocol, or its package is not installed.
    """
    if "://" in path:
        try:
            files, name = fsspec.url_to_fs(path)
        except (ImportError, ValueError) as error:
            raise BulkError(f"{path} cannot be used: {error}") from None
    else:  # which would split it at "::"
        files, name = fsspec.filesystem("file"), path
    files.invalidate_cache()
    return files, name


def list_files(source: str) -> Iterator[dict[str, Any]]:
    """Path, size and time of every image file below a folder of any file system, in a fixed order.

    Only one directory's names are in memory at a time.

    Args:
        source: a path, or a URL that fsspec reads.

    Raises:
        BulkError: a folder cannot be listed, or a file has no URL that can be read later.
    """
    if re.search("://[^/]*:[^/]*@", source):
        raise BulkError(
            "the URL of the images has a password, which would be written into the rows: give it "
            "to fsspec in the environment, such as FSSPEC_SFTP_PASSWORD"
        )
    files, root = file_system(source)
    before = _before(source, root)
    try:
        for about in _walk(files, root):
            path = before + about["name"]
            if "://" in source and "::" in path:
                raise BulkError(f'{path} cannot be read: fsspec splits URLs at "::"')
            yield {"path": path, "size": about.get("size"), "mtime": _time(about)}
    except BulkError:
        raise
    except Exception as error:  # of the store's own client, or an OSError
        raise BulkError(f"{source} cannot be listed: {error}") from error


def _before(source: str, root: str) -> str:
    """What a source has before the path within its file system, such as protocol and host."""
    url = source if source.endswith(root) else source.rstrip("/")
    if not url.endswith(root):
        raise BulkError(
            f"{source} cannot be listed: its file system calls it {root}, from which the URLs of "
            "its files do not follow: write them into a manifest (.parquet)"
        )
    return url.removesuffix(root)


def _walk(files: Any, folder: str) -> Iterator[dict[str, Any]]:
    """What the file system says about each image file below a folder.

    fsspec's own walk leaves out folders that cannot be listed, and reports nothing.
    """
    folders = []
    for about in sorted(files.ls(folder, detail=True), key=lambda about: about["name"]):
        name = about["name"].rstrip("/")
        if about["type"] == "directory":
            if name != folder.rstrip("/"):
                folders.append(name)
            elif _has_nameless_folder(files, about["name"]):
                raise BulkError(
                    f"{name}// cannot be listed: the name of a folder is empty; write the URLs of "
                    "all files into a manifest (.parquet)"
                )
        elif is_image_name(name):
            yield about
    files.invalidate_cache()  # which would keep the names of all folders
    for name in folders:
        yield from _walk(files, name)


def _has_nameless_folder(files: Any, listed: str) -> bool:
    """Whether a folder that is in its own listing has a subfolder with an empty name.

    The folder of ``s3://bucket/folder//image.png`` is listed as ``bucket/folder/``. gcsfs says
    ``bucket/folder``, as it does of folders that an empty object marks.
    """
    if "http" in files.protocol:  # a link of an index to itself, or to ``/``
        return False
    return listed.endswith("/") or ("gs" in files.protocol and bool(files.find(listed, prefix="/")))


def absolute(path: str) -> str:
    """The path as other nodes understand it: their processes have other working directories."""
    is_absolute = "://" in path or os.path.isabs(path)
    return path if is_absolute else os.path.join(os.getcwd(), path)


def is_inside(path: str, folder: str) -> bool:
    """Whether a path or URL is that of a folder or below it; links on this machine are followed."""

    def place(of: str) -> str:
        name = of.removeprefix("file://")
        return (name if "://" in name else os.path.realpath(name)).rstrip("/") + "/"

    return place(path).startswith(place(folder))


def read_manifest(source: str) -> Iterator[dict[str, Any]]:
    """The same from a Parquet file with a column ``path`` and, if known, ``size`` and ``mtime``.

    Relative paths are those from this process's working directory.

    Raises:
        BulkError: it cannot be read, or has no paths.
    """
    try:
        files, name = file_system(source)
        with files.open(name, "rb") as file:
            table = parquet.ParquetFile(file)
            names = set(table.schema_arrow.names)
            if "path" not in names:
                raise BulkError(f"{source} has no column path")
            kept = [name for name in ("path", "size", "mtime") if name in names]
            for batch in table.iter_batches(PART_ROWS, columns=kept):
                for row in batch.to_pylist():
                    path = row["path"]
                    if not isinstance(path, str) or not path or "\0" in path:
                        raise BulkError(
                            f"{source}: a path must be text without zero bytes, got {path!r}"
                        )
                    yield {"path": absolute(path), "size": _size(row), "mtime": _time(row)}
    except BulkError:
        raise
    except Exception as error:  # of the store's own client or of Arrow, or a value's
        raise BulkError(f"{source} cannot be read: {error}") from error


def write_parts(rows: Iterable[dict[str, Any]], out: str) -> int:
    """Write rows into the folder ``out``, numbered; returns their number.

    Parts that an interrupted listing left there are removed.

    Raises:
        BulkError: the folder has other files.
    """
    files, folder = file_system(out)
    files.makedirs(folder, exist_ok=True)
    # Some stores list an object that marks the folder.
    found = [name for name in files.find(folder) if name.rstrip("/") != folder]
    for name in found:
        if not _PART.fullmatch(name.removeprefix(f"{folder}/")):
            raise BulkError(
                f"{out} has another file, {printable(name)}: take a new folder for the scores"
            )
    for name in found:
        files.rm_file(name)
    rest, count = iter(rows), 0
    while chosen := list(islice(rest, PART_ROWS)):
        numbered = [
            {
                **row,
                "id": count + i,
                "path": printable(row["path"]),
                "file": os.fsencode(row["path"]),
            }
            for i, row in enumerate(chosen)
        ]
        path = posixpath.join(folder, f"part-{count // PART_ROWS:08d}{SUFFIX}")
        with files.open(path, "wb") as file:
            parquet.write_table(pa.Table.from_pylist(numbered, SCHEMA), file)
        count += len(chosen)
    return count


def some_files(out: str, count: int) -> list[str]:
    """About ``count`` files, spread over the manifest in the folder ``out/manifest``."""
    files, folder = file_system(posixpath.join(out, "manifest"))
    parts = sorted(name for name in files.find(folder) if name.endswith(SUFFIX))
    chosen = parts[:: math.ceil(len(parts) / count)]
    found = []
    for part in chosen:
        with files.open(part, "rb") as file:
            names = parquet.read_table(file, columns=["file"])["file"].to_pylist()
        found += names[:: math.ceil(len(names) * len(chosen) / count)]
    return [os.fsdecode(name) for name in found]


def read_json(path: str) -> Any:
    """The content of a JSON file; ``None`` if there is none."""
    files, name = file_system(path)
    try:
        content = files.cat_file(name)
    except FileNotFoundError:  # `exists` takes any error for a missing file
        return None
    return json.loads(content)


def write_json(path: str, value: Any) -> None:
    files, name = file_system(path)
    files.makedirs(posixpath.dirname(name), exist_ok=True)
    if "file" in files.protocol:  # elsewhere an object appears whole
        files.pipe_file(name + ".new", json.dumps(value, indent=2).encode())
        files.mv(name + ".new", name)
    else:
        files.pipe_file(name, json.dumps(value, indent=2).encode())


def _size(about: dict[str, Any]) -> int | None:
    value = about.get("size")
    if value is None:
        return None
    size = int(value)  # ValueError for NaN
    if not 0 <= size < 2**63:
        raise ValueError(f"a size must be a number of bytes, got {value!r}")
    return size


def _time(about: dict[str, Any]) -> float | None:
    for name in _TIMES:
        value = about.get(name)
        if value is not None:
            if isinstance(value, datetime):
                return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
            return float(value)
    return None
