"""Commands that messages suggest, as the user can paste them."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path


def command(*words: str | Path) -> str:
    """Write a command of ``ade``, with the program as the user typed it."""
    program = sys.argv[0]
    if Path(program).name != "ade" or program == shutil.which("ade"):
        program = "ade"
    return shlex.join([program, *map(str, words)])
