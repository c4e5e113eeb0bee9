"""The progress bar of verbs that read many images."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from tqdm import tqdm


@contextlib.contextmanager
def progress_bar() -> Iterator[Callable[[int, int], None]]:
    """Show progress on standard error, from the first call on: errors before it have no bar.

    Yields:
        A function that takes the number of images that are done and of all. What is done at its
        first call, such as by an interrupted run, does not count towards the speed.
    """
    bar: tqdm | None = None

    def progress(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            bar = tqdm(
                total=total,
                initial=done,
                unit="img",
                file=sys.stderr,
                dynamic_ncols=True,
                smoothing=0.05,
            )
        bar.update(done - bar.n)

    try:
        yield progress
    finally:
        if bar is not None:
            bar.close()
