"""The working folder of a running service: what lies where in it, who holds it, and how others find
it by the ports.

It has mode 0700: the Unix domain sockets, keys and tokens in it are for the user that serves and
for nobody else. It does not lie among the temporary files, which cleaners delete by age.
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

from serving.locks import LOCK, claim, lock
from serving.ports import Ports

VARIABLE = "ADE_RUN_DIR"
PREFIX = "ade-serve-"
MAX_SOCKET_PATH = 107  # bytes; longer addresses of Unix domain sockets do not exist
LONGEST_SOCKET = "tmp/.ts.sock.65535"  # of a worker, named by the model server


class RunFolderError(RuntimeError):
    """There is no usable place for the working folder."""


@dataclass(frozen=True)
class RunFolder:
    """Names of what lies in the folder of one service."""

    path: Path

    @property
    def inference_socket(self) -> Path:
        return self.path / "inference.sock"

    @property
    def management_socket(self) -> Path:
        return self.path / "management.sock"

    @property
    def metrics_socket(self) -> Path:
        return self.path / "metrics.sock"

    @property
    def store(self) -> Path:
        """Model archives."""
        return self.path / "store"

    @property
    def temporary(self) -> Path:
        """The model server's: unpacked archives and the workers' sockets."""
        return self.path / "tmp"

    @property
    def stop_folder(self) -> Path:
        """Where it exists, workers refuse requests, and leave a sign in it once they are done."""
        return self.path / "stopping"

    @property
    def token_file(self) -> Path:
        return self.path / "token"

    @property
    def header_file(self) -> Path:
        """The token as a header line: ``curl -H @FILE`` keeps it out of the list of processes."""
        return self.path / "authorization"

    @property
    def probe_file(self) -> Path:
        return self.path / "probe"

    @property
    def description(self) -> Path:
        return self.path / "service.json"

    def write(self, file: Path, text: str) -> None:
        """Write a file of mode 0600 in one step."""
        new = file.with_suffix(".new")
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
            out.write(text)
        os.replace(new, file)

    def read(self, file: Path) -> str | None:
        """The text of a file; ``None`` where it does not exist or is not ours to read."""
        try:
            return file.read_text()
        except OSError:
            return None

    def describe(self, ports: Ports, host: str, logs: Path, pids: dict[str, int]) -> None:
        """Write down what :func:`find_service` looks for."""
        self.write(
            self.description,
            json.dumps({"host": host, "ports": vars(ports), "logs": str(logs), "pids": pids}),
        )

    def read_description(self) -> dict[str, Any] | None:
        try:
            found = json.loads(self.read(self.description) or "")
        except ValueError:
            return None
        return found if isinstance(found, dict) else None

    def server_key(self, kind: str) -> str | None:
        """The model server's key to ``inference`` or ``management``; ``None`` until written."""
        try:
            return str(json.loads(self.read(self.path / "key_file.json") or "")[kind]["key"])
        except (ValueError, KeyError, TypeError):
            return None

    def is_held(self) -> bool:
        """Whether it is there, with the lock that shows that it is used."""
        return (self.path / LOCK).exists()


@contextlib.contextmanager
def run_folder() -> Iterator[RunFolder]:
    """A working folder, locked and gone afterwards; those of services that died before are removed.

    Raises:
        RunFolderError: ``ADE_RUN_DIR`` cannot be used.
    """
    path, held = _new_folder()
    try:
        yield RunFolder(path)
    finally:
        shutil.rmtree(path, ignore_errors=True)
        held.close()


def find_service(ports: Ports) -> RunFolder | None:
    """The folder of the service on these ports, if this user's."""
    for path in _folders():
        folder = RunFolder(path)
        found = folder.read_description()
        if found is not None and found.get("ports") == vars(ports) and not _is_abandoned(path):
            return folder
    return None


def _base() -> Path:
    """Where working folders belong.

    Raises:
        OSError: the user has no home.
    """
    explicit = os.environ.get(VARIABLE)
    if explicit:
        return Path(explicit).absolute()
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    if not os.path.isabs(cache):
        raise FileNotFoundError(f"{cache} is not an absolute path")
    return Path(cache, "ade", "run")


def _new_folder() -> tuple[Path, Any]:
    try:
        base = _base()
        base.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_private(base)
        with claim(
            base, wait=True
        ):  # two services that start at once must not take each other's folder for abandoned
            for path in _folders():
                if _is_abandoned(path):
                    shutil.rmtree(path, ignore_errors=True)
            return _make(base)
    except OSError as error:
        reason = str(error)
    if os.environ.get(VARIABLE):
        raise RunFolderError(
            f"{VARIABLE} must be a folder with a short path that you can write and nobody else: {reason}"
        )
    print(
        f"no working folder in the cache ({reason}): taking one among the temporary files",
        file=sys.stderr,
        flush=True,
    )
    try:
        temporary = Path(tempfile.gettempdir())
        if (
            not temporary.stat().st_mode & stat.S_ISVTX
        ):  # where it is set, as for /tmp, nobody can rename others' folders
            _check_private(temporary)
        return _make(temporary)
    except OSError as error:
        raise RunFolderError(
            f"no working folder in the cache or among the temporary files: {error}"
        ) from None


def _check_private(base: Path) -> None:
    """Make sure that nobody else can put something of theirs in the place of the working folder, or
    of the lock beside it.

    Raises:
        PermissionError: others can.
    """
    found = base.stat()
    if found.st_uid != os.getuid():
        raise PermissionError(f"{base} belongs to another user")
    if found.st_mode & 0o022:
        raise PermissionError(f"others can write {base}: take a folder in it, or chmod go-w")


def _make(base: Path) -> tuple[Path, Any]:
    path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
    if len(os.fsencode(path / LONGEST_SOCKET)) > MAX_SOCKET_PATH:
        path.rmdir()
        most = MAX_SOCKET_PATH - len(os.fsencode(path.relative_to(base) / LONGEST_SOCKET)) - 1
        raise OSError(f"{base} has more than {most} bytes, too many for addresses of sockets in it")
    held = open(path / LOCK, "w")
    lock(held)
    return path, held


def _folders() -> list[Path]:
    """This user's folders of services, running or not."""
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
    """Whether nobody holds the lock of a folder; never where that cannot be known."""
    try:
        with open(path / LOCK) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False
