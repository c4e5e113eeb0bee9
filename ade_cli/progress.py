"""The progress bar of commands that can be resumed."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from tqdm import tqdm


@contextlib.contextmanager
def progress_bar() -> Iterator[Callable[[int, int], None]]:
    """Show a bar on standard error; yields a function of the number of images done and of all.

    What was done before the first call does not count for the rate.
    """
    with tqdm(unit="img", file=sys.stderr, dynamic_ncols=True, smoothing=0.05) as bar:

        def progress(done: int, total: int) -> None:
            if bar.total is None:
                bar.initial = bar.n = bar.last_print_n = done
            bar.total = total
            bar.update(done - bar.n)

        yield progress
