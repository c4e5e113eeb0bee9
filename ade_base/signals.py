"""Delivers signals at a better moment."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Deliver SIGINT and SIGTERM after the block, where they would raise an exception inside it.

    They are not blocked, because child processes inherit that. Python delivers them to the main
    thread. A signal without a Python handler keeps its effect: ``torchrun`` ends a process at once
    that waits for another one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    signs = [s for s in (signal.SIGINT, signal.SIGTERM) if callable(signal.getsignal(s))]
    before = [signal.signal(sign, lambda number, frame: held.append(number)) for sign in signs]
    try:
        yield
    finally:
        for sign, handler in zip(signs, before, strict=True):
            signal.signal(sign, handler)
        for number in held:
            signal.raise_signal(number)
