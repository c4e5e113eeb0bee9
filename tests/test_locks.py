"""Locks between processes."""

from __future__ import annotations

import errno
import fcntl
import threading
from pathlib import Path

import pytest

from serving.locks import LOCK, claim, lock
from tests.helpers import held_by_another


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with held_by_another(path), open(path, "w") as file:
        assert not lock(file)
    with open(path, "w") as file, open(path, "w") as other:
        assert lock(file) and not lock(other)


def test_a_report_is_written_by_one_at_a_time(tmp_path: Path) -> None:
    order: list[str] = []

    def write() -> None:
        with claim(tmp_path, wait=True) as is_ours:
            assert is_ours
            order.append("written")

    with held_by_another(tmp_path / LOCK) as holder:
        waiting = threading.Thread(target=write)
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive() and not order
        order.append("let go")
        holder.kill()
        waiting.join(30)
    assert order == ["let go", "written"]


def test_without_file_locks_work_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with claim(tmp_path / "new") as is_ours:
        assert is_ours
