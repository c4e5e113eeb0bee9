"""Keeps the calibrations of a bundle by name, and follows changes of their files.

``BUNDLE/calibrations/NAME.npz`` is the calibration NAME, for example of a camera or a tenant. A
file that is added, replaced or removed is noticed within a second. A request is answered by the
calibration that it got, whatever happens to the file meanwhile.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import stat
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ade_base.files import replacing
from ade_base.messages import show
from ade_client.contract import DEFAULT
from serving.verdict.calibration import CalibrationError
from serving.verdict.calibration_file import Calibrations, version_of

logger = logging.getLogger(__name__)
FOLDER = "calibrations"  # of a bundle
SUFFIX = ".npz"
ALL = "/"  # key of the folder itself among the broken names, which no file has
CHECK_S = 1.0  # between two readings of the folder
PATIENCE_S = 2.0  # for a reading, after which requests are answered by what was read before
LOOKUP_S = 20.0  # the same where the former content does not help, as for a new name
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_Seen = tuple[int, int, int, int]  # inode, times of the last changes in ns, bytes
_GONE: _Seen = (-1, -1, -1, -1)  # equal to that of no file


class UnknownCalibration(CalibrationError):
    """There is no calibration of this name."""


def check_name(name: str) -> None:
    """Check that a calibration can have this name, which is part of file names and metrics.

    Raises:
        CalibrationError: it cannot.
    """
    if not _NAME.fullmatch(name):
        raise CalibrationError(
            "the name of a calibration must have at most 64 letters, digits, '-', '_' and '.', and "
            f"begin with a letter or digit; got {show(name)}"
        )


def path_of(bundle: Path, name: str) -> Path:
    """Path of a bundle's calibration of this name.

    Raises:
        CalibrationError: the name is not valid.
    """
    check_name(name)
    return bundle / FOLDER / f"{name}{SUFFIX}"


def folder_of(bundle: Path) -> Path:
    """The folder of a bundle's named calibrations; it is created if it does not exist.

    Whoever can read the bundle can read it, whatever umask and user the writer has.
    """
    folder = bundle / FOLDER
    with contextlib.suppress(FileExistsError):
        folder.mkdir()
        _open_to_readers(folder, bundle.stat(), 0o777)
    return folder


def _open_to_readers(path: Path | int, like: os.stat_result, bits: int) -> None:
    """Let those who can read another file or folder read a new one, too; nobody loses a right.

    Args:
        path: of the new one, or its open file.
        like: of the other one. Its owner and group are taken over as far as this process may.
        bits: of the mode that are taken over.
    """
    for owner, group in ((like.st_uid, like.st_gid), (-1, like.st_gid)):
        with contextlib.suppress(PermissionError):
            os.chown(path, owner, group)
            break
    os.chmod(path, stat.S_IMODE(os.stat(path).st_mode) | like.st_mode & bits)


def write_calibrations(bundle: Path, calibrations: Calibrations) -> Calibrations:
    """Write a named calibration into a bundle's folder in one step; running services take it over.

    Whoever can read the bundle, or the file that is replaced, can read it.

    Args:
        bundle: the bundle's folder.
        calibrations: with a name and the model's hash.

    Returns:
        The calibrations with their version.

    Raises:
        CalibrationError: the name is not valid.
    """
    path = path_of(bundle, calibrations.name)
    folder_of(bundle)
    like = (path if path.exists() else bundle).stat()
    content = calibrations.to_bytes()
    with replacing(path) as file:
        file.write(content)
        _open_to_readers(file.fileno(), like, 0o666)
    return replace(calibrations, version=version_of(content))


class CalibrationStore:
    """Hands out calibrations by name; may be used by several threads at once.

    A file that cannot be used is reported in :attr:`broken` and in the log, and its former content
    stays in use; so it does if the folder vanishes, or is replaced with its bundle. A named file
    that is removed is forgotten.

    ``default.npz`` takes the place of the bundle's own calibration, which would accept other
    images. Once the file has been seen, the bundle's own does not decide again, even if the file
    disappears: what was read of it stays in use, and if nothing was read, there is no verdict. Nor
    is there one if the bundle is not where it should be, or if the folder of the named calibrations
    is a link that leads nowhere, because it may have held that file.

    A calibration that another version of libwebp helped to make is used, with a warning in the log.

    Args:
        own: the bundle's own calibrations.
        folder: folder of the named ones, in the bundle's folder; it need not exist. ``None`` to use
            none.
        model: :attr:`serving.engine.bundle.Bundle.networks`: a calibration of another model, or
            with other features, is not used.
        statistics: names of the statistics that are computed.
        is_there: whether the bundle that is served is still where the folder belongs.
        memory: a file by which other processes, also later ones, know that ``default.npz`` was
            seen; it need not exist. ``None`` to forget it with this process.
    """

    def __init__(
        self,
        own: Calibrations,
        folder: Path | None,
        model: str,
        statistics: Sequence[str],
        is_there: Callable[[], bool] = lambda: True,
        memory: Path | None = None,
    ) -> None:
        self._own = own
        self._folder = folder
        self._model = model
        self._statistics = statistics
        self._is_there = is_there
        self._reading: threading.Thread | None = None  # the last reading after the first
        self._start_lock = threading.Lock()
        self._seen: dict[str, _Seen] = {}
        # In use for `default` until its file has been read: no verdict.
        self._current = {DEFAULT: own if folder is None else Calibrations(is_broken=True)}
        self._broken: dict[str, str] = {}
        self._checked = time.monotonic()
        # Whether the last refresh read every file. If not, unchanged files are read again.
        self._was_read = False
        self._memory = memory
        self._had_default = False
        # Whether the folder may hold files, when it was last there.
        self._may_hold_files = False
        self._device: int | None = None  # of the folder when its files were last read
        self._refresh()
        if folder is not None and self._current[DEFAULT] is own:
            _warn_of_another_coder(own)

    @property
    def names(self) -> list[str]:
        """Names of all calibrations, in order."""
        return sorted(self._current)

    @property
    def versions(self) -> dict[str, str]:
        """Versions by name; empty for one that judges nothing."""
        return {name: its.version for name, its in self._current.items()}

    @property
    def broken(self) -> dict[str, str]:
        """By name, why a file cannot be used; what was read of it before stays in use."""
        return self._broken

    @property
    def missing(self) -> list[str]:
        """Names of calibrations whose files cannot be used and were not read before."""
        current = self._current
        # Other names are no calibration's.
        named = [name for name in self._broken if _NAME.fullmatch(name) and name not in current]
        return [*named, DEFAULT] if current[DEFAULT].is_broken else named

    def get(self, name: str = DEFAULT) -> Calibrations:
        """The calibration of a name; its file was read at most a second ago.

        An unknown name is looked up in the folder at once, so that the first request that names a
        new calibration finds it.

        Raises:
            UnknownCalibration: there is none; the error lists the existing ones.
        """
        if time.monotonic() - self._checked >= CHECK_S:
            self.refresh()
        # A reading that another thread began may have missed a new file.
        for _ in range(2):
            if name not in self._current:
                self.refresh(is_needed=True)
        found = self._current.get(name)
        if found is None and (name in self._broken or ALL in self._broken):
            raise UnknownCalibration(f"the file of the calibration {show(name)} cannot be used")
        if found is None:
            raise UnknownCalibration(
                f"there is no calibration {show(name)}; there are {', '.join(self.names)}"
            )
        return found

    def usable(self, name: str = DEFAULT) -> Calibrations:
        """The calibration of a name, unless its file cannot be used.

        Raises:
            UnknownCalibration: no calibration has this name.
            CalibrationError: its file, or the whole folder, cannot be used.
        """
        self.refresh(is_needed=True)
        for key in (name, ALL):
            if key in self._broken:
                raise CalibrationError(self._broken[key])
        return self.get(name)

    def refresh(self, is_needed: bool = False) -> None:
        """Read what has changed in the folder.

        In a thread, because a network file system may hang, which nothing can interrupt: the
        former calibrations then stay in use.

        Args:
            is_needed: whether to wait longer for the reading, because the former do not help.
        """
        if self._folder is None:
            return
        with self._start_lock:
            if self._reading is None or not self._reading.is_alive():
                self._checked = time.monotonic()
                reading = threading.Thread(target=self._read_changes, daemon=True)
                try:
                    reading.start()
                except (RuntimeError, MemoryError):
                    self._keep(f"{self._folder} was not read: there is no room for a thread")
                    return
                self._reading = reading
            reading = self._reading
        latest = self._checked + (LOOKUP_S if is_needed else PATIENCE_S)
        reading.join(max(0.0, latest - time.monotonic()))
        if reading.is_alive():
            self._keep(f"{self._folder} does not answer")

    def _read_changes(self) -> None:
        try:
            self._refresh()
        except Exception as error:  # nobody sees the errors of a thread
            logger.exception("the calibrations cannot be read")
            self._keep(f"{self._folder} cannot be read: {error!r}")

    def _refresh(self) -> None:
        if self._folder is None:
            return
        self._had_default |= self._is_remembered()
        try:
            device: int | None = device_of(self._folder)
            found = _files(self._folder)
            if device_of(self._folder) != device:
                self._keep(f"{self._folder} was mounted or unmounted while it was read")
                return
        except FileNotFoundError:
            # Moved, or unmounted.
            if self._may_hold_files or self._had_default or self._folder.is_symlink():
                self._keep(f"{self._folder} is gone")
                return
            found, device = {}, None
        except OSError as error:
            self._may_hold_files = True
            self._keep(f"{self._folder} cannot be read: {error.strerror}")
            return
        if self._had_default:
            found.setdefault(DEFAULT, _GONE)
        is_unchanged = self._was_read and found == self._seen and ALL not in self._broken
        # A missing folder says nothing about the bundle.
        if not (is_unchanged and device is not None) and not self._is_there():
            self._keep(f"{self._folder.parent} no longer holds the bundle that is served")
            return
        lost = sorted(self._seen.keys() - found.keys())
        if lost and device != self._device:
            self._keep(f"{self._folder} is on another disk than before, without {', '.join(lost)}")
            return
        self._may_hold_files = bool(found)
        if DEFAULT in found:  # of this bundle, not of another one in its place
            self._remember_default()
        if is_unchanged:
            self._device = device  # the same files may have been mounted again
            return
        current, broken = {DEFAULT: self._own}, {}
        unread: set[str] = set()
        for name, seen in found.items():
            try:
                current[name] = self._read(self._folder, name, seen)
            # A damaged file can make NumPy raise anything, and must stop no request.
            except Exception as error:
                broken[_printable(name)] = str(error) or type(error).__name__
                # These may pass: try again next time.
                if isinstance(error, MemoryError) or isinstance(error.__cause__, OSError):
                    unread.add(name)
                former = self._current.get(name)
                if former is self._own:  # nothing was read of this file before
                    former = Calibrations(is_broken=True)
                if former is not None:
                    current[name] = former
        # One assignment each: readers see either the former or the new calibrations.
        self._current = current
        self._seen = {name: seen for name, seen in found.items() if name not in unread}
        self._device = device
        self._was_read = not unread
        self._report(broken)

    def _read(self, folder: Path, name: str, seen: _Seen) -> Calibrations:
        check_name(name)
        if seen == _GONE:
            raise CalibrationError(
                f"{folder / name}{SUFFIX} is gone: put it back, or restart the service if the "
                "bundle's own calibration is to decide"
            )
        if self._seen.get(name) == seen:
            if name in self._broken:
                raise CalibrationError(self._broken[name])
            return self._current[name]
        read = Calibrations.load(folder / f"{name}{SUFFIX}", name)
        if read.model != self._model:
            raise CalibrationError(
                f"{name} was calibrated for a model with the weights {_short(read.model)}, "
                f"these are {_short(self._model)}"
            )
        read.check(self._statistics)
        _warn_of_another_coder(read)
        return read

    def _is_remembered(self) -> bool:
        # Not Path.exists, which raises an error if the folder cannot be entered.
        return self._memory is not None and os.path.exists(self._memory)

    def _remember_default(self) -> None:
        is_new, self._had_default = not self._had_default, True
        if self._memory is None or self._is_remembered():
            return
        try:
            self._memory.parent.mkdir(exist_ok=True)
            self._memory.touch()
        except OSError as error:  # such as of a full disk: the next reading tries again
            if is_new:
                logger.warning("%s cannot be made: %s", self._memory, error.strerror)

    def _keep(self, reason: str) -> None:
        """Keep in use what was read before: the folder says nothing."""
        self._report({**self._broken, ALL: reason})

    def _report(self, broken: dict[str, str]) -> None:
        for name, reason in broken.items():
            if self._broken.get(name) != reason:
                logger.warning("calibration %s cannot be used: %s", name, reason)
        self._broken = broken


def _warn_of_another_coder(calibrations: Calibrations) -> None:
    warning = calibrations.other_coder()
    if warning is not None:
        logger.warning("%s", warning)


def _short(model: str) -> str:
    weights, _, features = model.partition(":")
    return (
        f"{weights[:12] or 'unknown'} {f'and features {features[:12]}' if features else ''}".strip()
    )


def _printable(name: str) -> str:
    """A name that a calibration cannot have, for metrics and logs; others are left as they are."""
    shown = re.sub(r"[^A-Za-z0-9_.-]", "?", name)
    return shown if len(shown) <= 64 else f"{shown[:63]}?"  # not the name of another calibration


def device_of(folder: Path) -> int:
    """Identify the disk, and so the mount, that a folder is on."""
    return folder.stat().st_dev


def _files(folder: Path) -> dict[str, _Seen]:
    """Files by the names of their calibrations, in order, without hidden (half-written) ones."""
    found: dict[str, _Seen] = {}
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.endswith(SUFFIX) and not entry.name.startswith("."):
            try:
                try:
                    status = entry.stat()
                except OSError:  # a link that leads nowhere or in circles: reading it will fail
                    status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:  # removed meanwhile
                continue
            found[entry.name.removesuffix(SUFFIX)] = (
                status.st_ino,
                status.st_mtime_ns,
                status.st_ctime_ns,  # changes with the permissions, too
                status.st_size,
            )
    return found
