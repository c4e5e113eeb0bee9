"""Locks between processes."""

from __future__ import annotations

import errno
import fcntl
import threading

import pytest
from filelock import Timeout

from ade_base.files import locked
from tests.helpers import held_by_another


def test_a_lock_ends_with_its_process(tmp_path):
    path = tmp_path / "new" / "lock"
    with held_by_another(path), pytest.raises(Timeout), locked(path):
        pass
    with locked(path), pytest.raises(Timeout), locked(path):
        pass
    with locked(path):
        pass


def test_a_report_is_written_by_one_at_a_time(tmp_path):
    order: list[str] = []

    def write():
        with locked(tmp_path / "lock", wait=True):
            order.append("written")

    with held_by_another(tmp_path / "lock") as holder:
        waiting = threading.Thread(target=write)
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive() and not order
        order.append("let go")
        holder.kill()
        waiting.join(30)
    assert order == ["let go", "written"]


def test_a_lock_follows_no_link(tmp_path):
    """Somebody may have put a link in the place of the lock file."""
    theirs = tmp_path / "theirs"
    theirs.write_text("precious")
    (tmp_path / "lock").symlink_to(theirs)
    with pytest.raises(OSError, match="cannot be locked"), locked(tmp_path / "lock"):
        pass
    assert theirs.read_text() == "precious"


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    refused = pytest.raises(OSError, match="cannot be locked: No locks available")
    with refused as raised, locked(tmp_path / "lock"):
        pass
    assert raised.value.filename == str(tmp_path / "lock")
