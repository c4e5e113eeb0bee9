"""The working folder of a running service: its files, its lock, and how to find it by the ports.

The folder has mode 0700, because its Unix domain sockets, keys and tokens are only for the user who
runs the service. It is in the temporary folder, where cleaners delete old files, only if there is
no other place.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from ade_base.errors import UserError
from ade_base.files import LOCK, locked
from ade_base.ports import Ports

VARIABLE = "ADE_RUN_DIR"
PREFIX = "ade-serve-"
MAX_SOCKET_PATH = 107  # bytes, the limit of Unix domain sockets
LONGEST_SOCKET = "r9999/tmp/.ts.sock.65535"  # of a worker, named by the model server


class RunFolderError(UserError, RuntimeError):
    """The working folder cannot be created."""


@dataclass(frozen=True)
class RunFolder:
    """Paths in the working folder of one service."""

    path: Path

    @property
    def control_socket(self) -> Path:
        """Where ``ade serve`` answers ``ade publish`` and ``ade status``."""
        return self.path / "control.sock"

    @property
    def front_socket(self) -> Path:
        """Where the front answers ``ade serve``."""
        return self.path / "front.sock"

    def of_release(self, number: int) -> Path:
        """The folder of the processes of a release."""
        return self.path / f"r{number}"

    @property
    def token_file(self) -> Path:
        return self.path / "token"

    @property
    def header_file(self) -> Path:
        """The token as a header line for ``curl -H @FILE``, which keeps it out of ``ps``."""
        return self.path / "authorization"

    @property
    def probe_file(self) -> Path:
        return self.path / "probe"

    @property
    def description(self) -> Path:
        return self.path / "service.json"

    def write(self, file: Path, text: str) -> None:
        """Write a file of mode 0600 atomically.

        Raises:
            OSError: it cannot be written. The error has its name, also if the disk is full.
        """
        new = file.with_suffix(".new")
        try:
            with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
                out.write(text)
            os.replace(new, file)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(file)) from error

    def read(self, file: Path) -> str | None:
        """The text of a file; ``None`` if it does not exist or cannot be read."""
        try:
            return file.read_text()
        except OSError:
            return None

    def describe(self, ports: Ports, host: str, logs: Path, pids: dict[str, int]) -> None:
        """Write the description that :func:`find_service` reads.

        Raises:
            OSError: the first description cannot be written. If a later one cannot, for example
                because the disk is full, the older one stays: only its process ids are out of date.
        """
        text = json.dumps({"host": host, "ports": vars(ports), "logs": str(logs), "pids": pids})
        try:
            self.write(self.description, text)
        except OSError:
            if not self.description.exists():
                raise

    def read_description(self) -> dict[str, Any] | None:
        try:
            found = json.loads(self.read(self.description) or "")
        except ValueError:
            return None
        return found if isinstance(found, dict) else None

    def is_held(self) -> bool:
        """Whether the folder still exists, with the lock of the running service."""
        return (self.path / LOCK).exists()


@contextlib.contextmanager
def run_folder() -> Iterator[RunFolder]:
    """Create and lock a working folder for the block.

    Also removes the folders that killed services left behind.

    Raises:
        RunFolderError: the folder cannot be created, for example because ``ADE_RUN_DIR`` is
            invalid.
    """
    path, held = _new_folder()
    try:
        with kept_from_cleaners(path):
            yield RunFolder(path)
    finally:
        shutil.rmtree(path, ignore_errors=True)
        held.release()


@contextlib.contextmanager
def kept_from_cleaners(folder: Path) -> Iterator[None]:
    """Keep systemd-tmpfiles from deleting old files of a folder, until the block or process ends.

    It leaves out folders with a lock of BSD's kind, which a file system may not have.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def find_service(ports: Ports) -> RunFolder | None:
    """Find the working folder of this user's service on these ports."""
    for path in _folders():
        folder = RunFolder(path)
        found = folder.read_description()
        if found is not None and found.get("ports") == vars(ports) and not _is_abandoned(path):
            return folder
    return None


def _base() -> Path:
    """The parent of working folders.

    Raises:
        OSError: the user has no home directory.
    """
    explicit = os.environ.get(VARIABLE)
    if explicit:
        return Path(explicit).absolute()
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    if not os.path.isabs(cache):
        raise FileNotFoundError(f"{cache} is not an absolute path")
    return Path(cache, "ade", "run")


def _new_folder() -> tuple[Path, FileLock]:
    try:
        base = _base()
        for folder in (*reversed(base.parents), base):  # mkdir(parents=True) ignores the mode
            folder.mkdir(mode=0o700, exist_ok=True)
        _check_private(base)
        # The lock keeps services that start together from deleting each other's new folder.
        with locked(base / LOCK, wait=True):
            for path in _folders():
                # Elsewhere, a folder without a lock file may be a new one.
                is_known = path.parent == base or RunFolder(path).is_held()
                if is_known and _is_abandoned(path):
                    shutil.rmtree(path, ignore_errors=True)
            return _make(base)
    except OSError as error:
        reason = str(error)
    if os.environ.get(VARIABLE):
        raise RunFolderError(
            f"{VARIABLE} must be a folder with a short path that only you can write to: {reason}"
        )
    print(
        f"no working folder in the cache ({reason}): using the temporary folder",
        file=sys.stderr,
        flush=True,
    )
    try:
        temporary = Path(tempfile.gettempdir())
        if temporary.stat().st_mode & 0o022 and not temporary.stat().st_mode & stat.S_ISVTX:
            raise PermissionError(f"others can write to {temporary}, which has no sticky bit")
        return _make(temporary)
    except OSError as error:
        raise RunFolderError(
            f"no working folder in the cache or the temporary folder: {error}"
        ) from None


def _check_private(base: Path) -> None:
    """Check that no other user can replace the working folder or the lock beside it.

    Raises:
        PermissionError: another user can.
    """
    found = base.stat()
    if found.st_uid != os.getuid():
        raise PermissionError(f"{base} belongs to another user")
    if found.st_mode & 0o022:
        raise PermissionError(f"others can write to {base}: use a folder in it, or chmod go-w")


def _make(base: Path) -> tuple[Path, FileLock]:
    path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
    if len(os.fsencode(path / LONGEST_SOCKET)) > MAX_SOCKET_PATH:
        path.rmdir()
        most = MAX_SOCKET_PATH - len(os.fsencode(path.relative_to(base) / LONGEST_SOCKET)) - 1
        raise OSError(f"the path {base} has more than {most} bytes, too long for sockets in it")
    held = FileLock(path / LOCK)
    held.acquire()
    return path, held


def _folders() -> list[Path]:
    """List this user's working folders, of running and of dead services."""
    found = []
    for base in (_base, lambda: Path(tempfile.gettempdir())):
        with contextlib.suppress(OSError):
            found += [
                path
                for path in base().glob(f"{PREFIX}*")
                if path.is_dir() and not path.is_symlink() and path.stat().st_uid == os.getuid()
            ]
    return sorted(found)


def _is_abandoned(path: Path) -> bool:
    """Whether no process holds the lock of a folder; ``False`` if that is unknown."""
    # Not by a FileLock: versions 3.20.4 to 3.29.4 of filelock remove the file when they release it.
    try:
        descriptor = os.open(path / LOCK, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:  # its removal was interrupted
        return True
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
