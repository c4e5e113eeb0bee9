"""Scores the files of a manifest with one engine per worker, and resumes where it stopped.

``OUT/manifest/`` lists the files, ``OUT/plan.json`` says what is computed, ``OUT/rows/`` has the
scores as Parquet, ``OUT/checkpoint/`` the ids of the rows that are committed, and
``OUT/summary.json`` says that everything is there.
"""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
import posixpath
import re
import socket
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem
from pyarrow import dataset, fs, parquet

from ade_base.files import alone_in, read_file
from ade_base.messages import printable
from ade_base.pictures.decoders import DecoderError
from ade_base.pictures.read import MAX_FILE_BYTES
from extensions.ray.bulk import manifest
from extensions.ray.bulk.manifest import PART_ROWS
from extensions.ray.instance import BESIDE, ray_instance
from serving.api.score_table import columns
from serving.bulk import (
    CHUNK,
    ENDED,
    TRIED,
    BulkError,
    BulkOptions,
    FileScorer,
    Summary,
    Versions,
    row_schema,
)
from serving.engine.bundle import Bundle, BundleError, open_bundle
from serving.verdict.calibration import CalibrationError

logger = logging.getLogger(__name__)
LOOK_S = 2.0  # between two looks at what is committed
ROW_BYTES = 64  # of the manifest in memory, at least
THREADS = {"OMP_NUM_THREADS": "1"}
# Of a chunk whose worker ended: nodes may end, but a file that ends each worker must end the run.
RETRIES = 4
PENDING = ".pending"  # of Ray's files of ids, until their rows are written


class Scorer:
    """One worker's engine, for Ray Data.

    Args:
        bundle: its folder, which every node must have.
        options: how to score.
        versions: of the bundle and the calibration.
        others: files of which some can be read.

    Raises:
        BulkError: this node's bundle or calibration is missing, damaged or another one.
    """

    def __init__(
        self, bundle: str, options: BulkOptions, versions: Versions, others: Sequence[str] = ()
    ) -> None:
        try:
            opened = open_bundle(Path(bundle))
            self._scorer = FileScorer(opened, None, options, read_any_file, versions, others)
        except (BulkError, BundleError, CalibrationError, OSError) as error:
            raise BulkError(f"{socket.gethostname()}: {error}") from None
        self._schema = _schema(opened, options)

    def __call__(self, files: pa.Table) -> pa.Table:
        """Scores of some rows of the manifest."""
        paths = [os.fsdecode(path) for path in files["file"].to_pylist()]
        rows = [
            {"id": id, **row, "path": printable(path)}
            for id, path, row in zip(
                files["id"].to_pylist(), paths, self._scorer(paths), strict=True
            )
        ]
        return pa.Table.from_pylist(rows, self._schema)


def read_any_file(path: str) -> bytes:
    """Read an image file from any file system that fsspec knows.

    Raises:
        OSError: it cannot be read. ``EFBIG``: it is too large.
    """
    if "://" not in path:
        return read_file(Path(path))
    try:
        files, name = fsspec.url_to_fs(path)
        if isinstance(files, LocalFileSystem):  # whose open waits for the writer of a pipe
            return read_file(Path(name))
        content: bytes = files.cat_file(name, start=0, end=MAX_FILE_BYTES + 1)
    except OSError:
        raise
    except Exception as error:  # of the store's own client: one file must not end the run
        raise OSError(errno.EIO, f"{type(error).__name__}: {error}") from error
    if len(content) > MAX_FILE_BYTES:
        raise OSError(errno.EFBIG, f"an image file may have at most {MAX_FILE_BYTES} bytes")
    return content


def score_on_ray(
    scorer: FileScorer,
    source: str,
    out: str,
    workers: int,
    address: str | None,
    progress: Callable[[int, int], None],
) -> Summary:
    """Score every image file of a source, each once.

    Args:
        scorer: of this process; those of the workers have its bundle, options and calibrations. The
            nodes have the bundle at the same path.
        source: a folder or the manifest of one (``.parquet``): a path or a URL.
        out: a folder: a new one, or that of an earlier call with the same arguments, which is
            resumed.
        workers: actors, each with one engine and one thread.
        address: of a Ray cluster; this machine if there is none.
        progress: called with the number of committed files and of all files.

    Raises:
        BulkError: there are no images, ``out`` is finished, in use or of another call, or a
            worker stops, such as for files that cannot be read at present.
        ClusterError: Ray cannot be used.
    """
    bundle, options, versions = scorer.bundle, scorer.options, scorer.versions
    # Completed by a shell, the name of a folder ends with a slash.
    source = source if "://" in source else str(Path(source))
    source, out = manifest.absolute(source), manifest.absolute(out)
    plan = {
        "model": bundle.model_id,
        "version": versions.calibration,
        "source": source,
        **dataclasses.asdict(options),
        "columns": columns(bundle, options.samples),
    }
    files, folder = manifest.file_system(out)
    is_local = "file" in files.protocol  # other stores have no locks
    with alone_in(Path(folder), BulkError) if is_local else nullcontext():
        if manifest.read_json(posixpath.join(out, "summary.json")) is not None:
            raise BulkError(f"{out} is complete already")
        total = _prepare(source, out, plan)
        _uncommit(out)
        with ray_instance(address, workers) as ray, _Progress(out, total, progress):
            try:
                _run(ray, scorer, out, workers, total)
            except ray.exceptions.RayError as error:
                reason = _reason(str(error))
                if reason is None and isinstance(error, ray.exceptions.RayActorError):
                    reason = None if error.actor_init_failed else ENDED
                if reason is None:
                    raise
                raise BulkError(reason) from None
        summary = _count(out, total)
        manifest.write_json(posixpath.join(out, "summary.json"), dataclasses.asdict(summary))
    return summary


def _reason(text: str) -> str | None:
    """The message with which a worker stopped the run, from Ray's error; ``None`` if it crashed.

    Ray keeps the text of such an error only, at the end of its traceback.
    """
    names = "|".join(
        re.escape(f"{e.__module__}.{e.__qualname__}") for e in (BulkError, DecoderError)
    )
    found = re.search(f"^(?:{names}): (.+)$", text, re.MULTILINE)
    return None if found is None else found[1]


def _prepare(source: str, out: str, plan: dict[str, Any]) -> int:
    """Write the manifest and then the plan, unless they are there; returns the number of files."""
    path = posixpath.join(out, "plan.json")
    found = manifest.read_json(path)
    if found is not None:
        total = int(found.pop("files"))
        if found != plan:
            raise BulkError(
                f"{out} was started with {found}, this call has {plan}: take another folder"
            )
        return total
    if manifest.is_inside(source, out):
        raise BulkError(f"{source} must lie outside of {out}: take a new folder for the scores")
    rows = manifest.read_manifest if manifest.is_manifest(source) else manifest.list_files
    total = manifest.write_parts(rows(source), posixpath.join(out, "manifest"))
    if not total:
        raise BulkError(f"{source} holds no images")
    manifest.write_json(path, {**plan, "files": total})
    return total


def _uncommit(out: str) -> None:
    """Make commits that were interrupted pending again: their files are scored once more.

    Ray commits by moving a file. An object store copies it and then deletes the first one: after a
    kill between the two, Ray would delete the rows, since their file is pending, and leave out
    their ids, since it is committed, too.
    """
    files, folder = manifest.file_system(posixpath.join(out, "checkpoint"))
    names = set(files.find(folder))
    for name in names:
        committed = name.removesuffix(PENDING + manifest.SUFFIX) + manifest.SUFFIX
        if committed != name and committed in names:
            files.rm_file(committed)


def _run(ray: Any, scorer: FileScorer, out: str, workers: int, total: int) -> None:
    from ray.data import ActorPoolStrategy, DataContext
    from ray.data.checkpoint import CheckpointConfig

    files, folder = _file_system(out)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    # Rows are small: by bytes alone, nothing would be committed before the end.
    context.target_min_block_size = 1
    context.target_max_block_size = PART_ROWS * ROW_BYTES
    context.checkpoint_config = CheckpointConfig(
        id_column="id",
        checkpoint_path=posixpath.join(folder, "checkpoint"),
        override_filesystem=files,
        delete_checkpoint_on_success=False,
    )
    # One actor leaves out committed rows: up to ten, by default, could take the workers' places.
    context.checkpoint_config.checkpoint_actor_pool_max_size = 1
    # Beyond what the ids need. It would wait for ever for its default of 1 GiB on a small machine.
    context.checkpoint_config.checkpoint_actor_memory_bytes = 0
    cpus = ray.cluster_resources().get("CPU", 0)
    if cpus < workers + BESIDE:
        logger.warning(
            "%d workers need a Ray cluster with %d CPUs, this one has %g: with fewer it waits for "
            "more nodes",
            workers,
            workers + BESIDE,
            cpus,
        )
    ray.data.read_parquet(
        posixpath.join(folder, "manifest"),
        filesystem=files,
        columns=["id", "file"],
        override_num_blocks=-(-total // PART_ROWS),
    ).map_batches(
        Scorer,
        fn_constructor_args=(
            manifest.absolute(str(scorer.bundle.folder)),
            scorer.options,
            scorer.versions,
            manifest.some_files(out, 2 * TRIED),
        ),
        batch_format="pyarrow",
        batch_size=CHUNK,
        compute=ActorPoolStrategy(size=workers),
        num_cpus=1,
        max_task_retries=RETRIES,
        runtime_env={"env_vars": THREADS},
    ).write_parquet(posixpath.join(folder, "rows"), filesystem=files)


def _file_system(path: str) -> tuple[fs.FileSystem, str]:
    """:func:`manifest.file_system` for Arrow."""
    files, name = manifest.file_system(path)
    if "file" in files.protocol:
        return fs.LocalFileSystem(), name
    return fs.PyFileSystem(fs.FSSpecHandler(files)), name


def _schema(bundle: Bundle, options: BulkOptions) -> pa.Schema:
    return pa.schema([("id", pa.int64()), *row_schema(columns(bundle, options.samples))])


class _Progress:
    """Reports committed rows while a block runs."""

    def __init__(self, out: str, total: int, progress: Callable[[int, int], None]) -> None:
        self._folder = posixpath.join(out, "rows")
        self._total = total
        self._progress = progress
        self._rows: dict[str, int] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> None:
        self._report()
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        self._report()

    def _look(self) -> None:
        while not self._ended.wait(LOOK_S):
            self._report()

    def _report(self) -> None:
        try:
            self._rows = self._committed()
        except Exception as error:  # of the store's own client: perhaps it passes
            logger.warning("%s cannot be listed: %s", self._folder, error)
            return
        self._progress(min(sum(self._rows.values()), self._total), self._total)

    def _committed(self) -> dict[str, int]:
        """Number of rows by file. A file may vanish: Ray deletes rows that it did not commit."""
        files, folder = _file_system(self._folder)
        rows = {}
        for found in files.get_file_info(fs.FileSelector(folder, allow_not_found=True)):
            if found.path in self._rows:
                rows[found.path] = self._rows[found.path]
            elif found.path.endswith(manifest.SUFFIX):
                try:
                    with files.open_input_file(found.path) as file:
                        rows[found.path] = parquet.read_metadata(file).num_rows
                except (OSError, pa.ArrowInvalid):  # being written
                    continue
        return rows


def _count(out: str, total: int) -> Summary:
    """Count the rows by decision.

    Raises:
        BulkError: a file has no row, or more than one.
    """
    files, folder = _file_system(posixpath.join(out, "rows"))
    counts: Counter[str] = Counter()
    found = np.zeros(total, bool)
    written = files.get_file_info(fs.FileSelector(folder, allow_not_found=True))
    rows = dataset.dataset(folder, filesystem=files, format="parquet") if written else None
    for batch in rows.to_batches(columns=["id", "decision", "error"]) if rows else ():
        ids = batch["id"].to_numpy()
        found[ids[ids < total]] = True
        for decision, error in zip(
            batch["decision"].to_pylist(), batch["error"].to_pylist(), strict=True
        ):
            counts["error" if error is not None else decision] += 1
    if counts.total() != total or not found.all():
        raise BulkError(
            f"{out} has {counts.total()} rows about {found.sum()} of {total} files: run the "
            "command again, or choose another folder if that does not help"
        )
    return Summary(counts["no_verdict"], counts["reject"], counts["accept"], counts["error"])
