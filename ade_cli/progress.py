"""The progress bar of verbs that read many images."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from tqdm import tqdm


@contextlib.contextmanager
def progress_bar() -> Iterator[Callable[[int, int], None]]:
    """Show progress on standard error.

    Yields:
        A function that takes the number of images that are done and of all. What is done at its
        first call, such as by an interrupted run, does not count towards the speed.
    """
    with tqdm(unit="img", file=sys.stderr, dynamic_ncols=True, smoothing=0.05) as bar:

        def progress(done: int, total: int) -> None:
            if bar.total is None:
                bar.initial = bar.n = bar.last_print_n = done
            bar.total = total
            bar.update(done - bar.n)

        yield progress
