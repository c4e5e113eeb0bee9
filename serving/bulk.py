"""Scores a folder of images with several processes, resumable and in bounded memory.

Rows are appended to ``OUT.part`` as lines of JSON, in the order of the files. If the program is
interrupted, at most the last line is incomplete, and the next call resumes after the last complete
one. At the end ``OUT.part`` is converted to ``OUT``.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence, Set
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from ade_base.errors import UserError
from ade_base.files import image_paths, naming, only_writer, read_file, replacing
from ade_base.messages import printable
from ade_base.pictures.decoders import DecoderError
from ade_base.pictures.read import IMAGE_SUFFIXES, in_options
from ade_base.system import signals_held
from ade_base.tables import write_csv
from ade_client.contract import DEFAULT
from serving.api.operations.score import score_result
from serving.api.score_table import columns, failed_row, scored_row
from serving.engine.bundle import Bundle, BundleError, open_bundle
from serving.engine.engine import InferenceEngine, NotFinite
from serving.ingest.errors import ApiError
from serving.ingest.picture import Picture, prepare_source
from serving.verdict.calibration import CalibrationError

FORMATS = (".csv", ".jsonl", ".parquet")
CHUNK = 64  # files per task
AHEAD = 3  # tasks submitted per process
ENDED = "a process ended (was there too little memory?): the same command resumes here"
ROWS_A_GROUP = 20_000  # of a Parquet file
TRIED = 16  # files, to know whether any can be read
RETRY_S = 2.0  # until files are read again whose errors may pass


class BulkError(UserError, ValueError):
    """Scoring cannot be started or resumed."""


class NothingScored(BulkError):
    """Every file had an error."""


@dataclass(frozen=True)
class BulkOptions:
    """How files are scored. Scoring is resumed only with the same options.

    Attributes:
        alpha: the false-alarm rate of ``ood``.
        samples: number of draws K per image.
        resize: ``fit`` to resize images of other sizes.
        calibration: name of the calibration that decides.
    """

    alpha: float = 0.01
    samples: int = 1
    resize: str | None = None
    calibration: str = DEFAULT


@dataclass(frozen=True)
class Summary:
    """Number of files by decision, and number of files with an error."""

    no_verdict: int
    rejected: int
    accepted: int
    errors: int

    @property
    def scored(self) -> int:
        return self.no_verdict + self.rejected + self.accepted


class Versions(NamedTuple):
    """Which bundle and calibration score: processes that score together must have the same."""

    bundle: str
    calibration: str


class FileScorer:
    """Scores files with an engine in this process.

    Args:
        bundle: has ``score``.
        folder: of the files; not used if ``read`` is given.
        options: how they are scored.
        read: reads a file by its path, or raises :class:`OSError`.
        like: what another process uses, which must be the same here.
        others: files of which some can be read, unless there is a folder.

    Attributes:
        bundle: as given.
        options: as given.
        calibrations: the calibrations that decide.

    Raises:
        BulkError: the bundle or the calibration is not that of the other process.
        BundleError: the bundle is incomplete or damaged, or cannot score.
        UnknownCalibration: the bundle has no such calibration.
    """

    def __init__(
        self,
        bundle: Bundle,
        folder: Path | None,
        options: BulkOptions,
        read: Callable[[str], bytes] | None = None,
        like: Versions | None = None,
        others: Sequence[str] = (),
    ) -> None:
        bundle.check_has("score")
        if like is not None and bundle.digest != like.bundle:
            raise BulkError(f"{bundle.folder} is another bundle here than where scoring began")
        self._engine = InferenceEngine(bundle, device="cpu", operations=["score"])
        self.calibrations = self._engine.calibrations_of(options.calibration)
        if like is not None and self.calibrations.version != like.calibration:
            raise BulkError(f"the calibration {options.calibration} was changed meanwhile")
        self._read_file = read or (lambda path: read_file((folder or Path()) / path))
        self._folder = folder
        self._others = others
        self._readable: str | None = None  # the last file that could be read
        self.bundle, self.options = bundle, options

    @property
    def versions(self) -> Versions:
        return Versions(self.bundle.digest, self.calibrations.version)

    def __call__(self, paths: list[str]) -> list[dict[str, Any]]:
        """Return one row per path, as :mod:`serving.api.score_table` makes them.

        Raises:
            BulkError: files cannot be read at present, so that errors would not be theirs.
        """
        images = self._read_all(paths)
        usable = [image for image in images if isinstance(image, Picture)]
        scores = iter(
            self._engine.score(
                np.stack([image.pixels for image in usable]),
                samples=[self.options.samples] * len(usable),
                resized=[image.resized for image in usable],
                calibrations=[self.calibrations] * len(usable),
                views=[image.view for image in usable],
            )
            if usable
            else []
        )
        return [
            self._row(path, image, next(scores) if isinstance(image, Picture) else None)
            for path, image in zip(paths, images, strict=True)
        ]

    def _read_all(self, paths: list[str]) -> list[Picture | ApiError]:
        """Read files, and those again whose errors may pass.

        Rows are final. A file that cannot be read has an error of its own only if another one can
        still be read: expired credentials or a lost server would be the error of all that follow,
        and the files of a lost mount do not exist.
        """
        images = [self._read(path) for path in paths]
        if _passing(images):
            time.sleep(RETRY_S)
            for i in _passing(images):
                images[i] = self._read(paths[i])
        failed = {
            path: image
            for path, image in zip(paths, images, strict=True)
            if isinstance(image, ApiError) and image.code == "unreadable"
        }
        for path in paths:
            if path not in failed:
                self._readable = path
        # Files that are given one by one may be all that there are.
        knows_others = bool(self._folder or self._others or self._readable)
        lost = [
            f"{printable(path)}: {error.message}"
            for path, error in failed.items()
            # A broken link is there, whereas a lost mount has no entries.
            if error.is_transient
            or (knows_others and not os.path.islink(os.path.join(self._folder or "", path)))
        ]
        if lost and not self._can_read(failed.keys()):
            raise BulkError(
                f"{lost[0]}, and no other file can be read either: call the same command again "
                "when they can be read, or leave them out"
            )
        return images

    def _can_read(self, failed: Set[str]) -> bool:
        """Whether a file that was read before, or else one of some others, can be."""
        if self._readable is not None and self._is_readable(self._readable):
            return True

        def others() -> Iterator[str]:
            known = self._others if self._folder is None else image_paths(self._folder)
            return (path for path in known if path not in failed)

        with suppress(OSError):  # of a folder that is lost
            count = sum(1 for _ in others())
            # Those of one subfolder may all be broken links.
            for path in islice(others(), 0, None, max(1, -(-count // TRIED))):
                if self._is_readable(path):
                    self._readable = path
                    return True
        return False

    def _is_readable(self, path: str) -> bool:
        image = self._read(path)
        return isinstance(image, Picture) or image.code != "unreadable"

    def _read(self, path: str) -> Picture | ApiError:
        fit = self.options.resize == "fit"
        return prepare_source(
            lambda: self._read_file(path), self._engine.image_shape, fit, self.calibrations.look_of
        )

    def _row(self, path: str, image: Picture | ApiError, score: Any) -> dict[str, Any]:
        if isinstance(image, ApiError):
            return failed_row(path, image.code, in_options(image.message))
        if isinstance(score, NotFinite):
            return failed_row(path, "not_finite", str(score))
        alpha, notes = self.options.alpha, image.notes
        result = score_result(score, self.calibrations, image.resized, alpha, notes)
        return scored_row(path, result)


def _passing(images: Sequence[Picture | ApiError]) -> list[int]:
    return [i for i, e in enumerate(images) if isinstance(e, ApiError) and e.is_transient]


def check_out(out: Path) -> None:
    """Check the file for a folder's scores.

    Raises:
        BulkError: its name has another ending than the formats, or it exists.
    """
    if out.suffix not in FORMATS:
        raise BulkError(f"{out}: the name must end with {', '.join(FORMATS)}")
    if out.exists():
        raise BulkError(f"{out} exists already: delete it, or choose another file")


def score_folder(
    scorer: FileScorer,
    folder: Path,
    out: Path,
    workers: int,
    progress: Callable[[int, int], None],
) -> Summary:
    """Score every image file below a folder into a file.

    Args:
        scorer: of this process; those of the others have its bundle, options and calibrations.
        folder: searched recursively.
        out: a ``.csv``, ``.jsonl`` or ``.parquet`` file that does not exist yet.
        workers: number of processes, each with one thread; no more than there are tasks.
        progress: called with the number of scored files and of all files.

    Raises:
        BulkError: there are no images, ``out`` exists or cannot be written, or an unfinished
            ``OUT.part`` belongs to other options or files.
        NothingScored: every file had an error; there is no table then.
    """
    check_out(out)
    bundle, options, version = scorer.bundle, scorer.options, scorer.calibrations.version
    total = sum(1 for _ in image_paths(folder))
    if not total:
        raise BulkError(f"{folder} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    workers = min(workers, -(-total // CHUNK))
    part = out.with_name(out.name + ".part")
    head = {
        "model": bundle.model_id,
        "version": version,
        "folder": str(folder.resolve()),
        **asdict(options),
        "columns": columns(bundle, options.samples),
    }
    with (
        only_writer(out, BulkError),
        naming(out, part),
        open(part, "a", encoding="utf-8", opener=_unless_link) as rows,
    ):
        if out.exists():  # another process has finished meanwhile
            if not os.fstat(rows.fileno()).st_size:  # opening made it
                part.unlink(missing_ok=True)
            raise BulkError(f"{out} exists already: delete it, or choose another file")
        done = _begin(part, head, folder)
        progress(done, total)
        chunks = _chunks(image_paths(folder), done)
        with closing(_in_order(scorer, folder, workers, chunks)) as scored:
            for made in scored:
                rows.write("".join(json.dumps(row) + "\n" for row in made))
                rows.flush()
                done += len(made)
                progress(done, total)
        try:
            summary = _finish(part, out, columns(bundle, options.samples))
        except NothingScored:  # rows of errors alone are not worth resuming
            part.unlink()
            raise
        part.unlink()
    return summary


def _unless_link(path: str, flags: int) -> int:
    """Open without following links: somebody could have put one at this predictable path."""
    try:
        return os.open(path, flags | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise BulkError(f"{path}: {error.strerror}") from None


def _begin(part: Path, head: dict[str, Any], folder: Path) -> int:
    """Count the rows of an unfinished file and cut off an incomplete last line."""
    end, count, paths = 0, -1, image_paths(folder)
    first = json.dumps(head) + "\n"
    with open(part, "rb") as lines:
        for line in lines:
            if count < 0 and not first.encode().startswith(line):  # may be incomplete
                begun, now = _differences(line, head)
                raise BulkError(
                    f"{part} was started with {begun}, this call has {now}: "
                    "remove the file to start again"
                )
            if not line.endswith(b"\n"):
                break
            if count >= 0:
                found, expected = _path_of(line), next(paths, None)
                if found is None:
                    raise BulkError(
                        f"{part}: line {count + 2} is damaged: remove the file to start again"
                    )
                if found != expected:
                    raise BulkError(
                        f"{folder} has changed since {part} was started: its file {count + 1} is "
                        f"{expected}, it was {found}; remove the .part file to start again"
                    )
            end, count = end + len(line), count + 1
    os.truncate(part, end)
    if count < 0:
        part.write_text(first)
        return 0
    return count


def _differences(line: bytes, head: dict[str, Any]) -> tuple[Any, Any]:
    """The values of another first line that differ, and these values of this one."""
    try:
        begun = json.loads(line)
    except ValueError:
        begun = None
    if not isinstance(begun, dict):
        return "something else", head
    names = [name for name in {**begun, **head} if begun.get(name) != head.get(name)]
    return {name: begun.get(name) for name in names}, {name: head.get(name) for name in names}


def _path_of(line: bytes) -> str | None:
    """The path of a row; ``None`` if the line is not one."""
    try:
        row = json.loads(line)
        return str(row["path"]) if row["decision"] else None
    except (ValueError, TypeError, KeyError):
        return None


def _chunks(paths: Iterator[str], done: int) -> Iterator[list[str]]:
    rest = islice(paths, done, None)
    while chunk := list(islice(rest, CHUNK)):
        yield chunk


def _in_order(
    scorer: FileScorer, folder: Path, workers: int, chunks: Iterator[list[str]]
) -> Generator[list[dict[str, Any]]]:
    """Score the chunks in several processes; yields their rows in order."""
    context = multiprocessing.get_context("spawn")  # forking a process with threads is unsafe
    for_workers, ours = context.Pipe(duplex=False)  # a worker ends where the other end is closed
    options_of = (scorer.bundle.folder, folder, scorer.options, scorer.versions, for_workers)
    pool = ProcessPoolExecutor(workers, context, _start_worker, options_of)
    waiting: deque[Future[list[dict[str, Any]]]] = deque()
    with for_workers:
        try:
            for chunk in chunks:
                waiting.append(_submit(pool, chunk))
                if len(waiting) >= AHEAD * workers:
                    yield _result(waiting.popleft())
            while waiting:
                yield _result(waiting.popleft())
        finally:
            # An exception in here would leave processes that the program's exit waits for.
            with signals_held():
                ours.close()  # after an error or interruption, nobody needs the rest
                pool.shutdown()


def _submit(pool: ProcessPoolExecutor, chunk: list[str]) -> Future[list[dict[str, Any]]]:
    """Submit a chunk. A worker that this starts inherits the mask: Ctrl-C is for its parent."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(_score_chunk, chunk)
    except BrokenProcessPool:
        raise BulkError(ENDED) from None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _result(future: Future[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    try:
        return future.result()
    except BrokenProcessPool:
        raise BulkError(ENDED) from None
    except DecoderError as error:
        raise BulkError(f"{error}: the same command resumes here") from None


_scorer: FileScorer | BulkError


def _start_worker(
    bundle: Path, folder: Path, options: BulkOptions, versions: Versions, parent: Connection
) -> None:
    global _scorer
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    try:
        _scorer = FileScorer(open_bundle(bundle), folder, options, like=versions)
    except (BulkError, BundleError, CalibrationError, OSError) as error:
        _scorer = BulkError(str(error))  # raised by the first chunk, whose caller sees it


def _end_with(parent: Connection) -> None:
    """End when the parent closes its end of a pipe, or is killed."""
    parent.poll(None)
    os._exit(1)


def _score_chunk(paths: list[str]) -> list[dict[str, Any]]:
    if isinstance(_scorer, BulkError):
        raise _scorer
    return _scorer(paths)


def _finish(part: Path, out: Path, names: list[str]) -> Summary:
    """Write the rows in the format of ``out`` and count them.

    Raises:
        NothingScored: every row has an error; ``out`` is not written.
    """
    counts: Counter[str] = Counter()
    errors: Counter[str] = Counter()
    notes: dict[str, str] = {}  # the first of each kind; all may not fit into memory

    def rows() -> Iterator[dict[str, Any]]:
        with open(part, encoding="utf-8") as lines:
            next(lines)  # the first line
            for line in lines:
                row = json.loads(line)
                counts["error" if "error" in row else row["decision"]] += 1
                if "error" in row:
                    errors[row["error"]] += 1
                    notes.setdefault(row["error"], row["notes"])
                row["path"] = printable(row["path"])
                yield {name: row.get(name) for name in names}

    with replacing(out, text=out.suffix != ".parquet") as file:
        if out.suffix == ".parquet":
            _write_parquet(file, names, rows())
        elif out.suffix == ".csv":
            write_csv(file, names, rows())
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows())
        summary = Summary(counts["no_verdict"], counts["reject"], counts["accept"], counts["error"])
        if not summary.scored:  # raised in here, so that the file does not appear
            ((error, count),) = errors.most_common(1)
            raise NothingScored(
                f"no image could be scored. The most frequent reason, of {count} of "
                f"{summary.errors} files: {notes[error]}"
            )
    return summary


def row_schema(names: list[str]) -> Any:
    """The Arrow schema of rows with these columns."""
    import pyarrow as pa

    kinds = {
        "ood": pa.bool_(),
        **dict.fromkeys(
            ("path", "error", "notes", "decision", "decision_reason", "calibration"), pa.string()
        ),
    }
    return pa.schema([(name, kinds.get(name, pa.float64())) for name in names])


def _write_parquet(file: IO[bytes], names: list[str], rows: Iterator[dict[str, Any]]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    schema = row_schema(names)
    with parquet.ParquetWriter(file, schema) as writer:
        while group := list(islice(rows, ROWS_A_GROUP)):
            writer.write_table(pa.Table.from_pylist(group, schema))
