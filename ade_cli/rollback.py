"""``ade rollback``."""

from __future__ import annotations

import argparse

from ade_cli.upgrade import ERRORS, command
from handlers.launch.upgrades import ROLLBACK

__all__ = ["ERRORS", "add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Undo the last `ade upgrade` of this user's running service, without an interruption: stop "
        "the canary, or else serve the previous bundle again."
    )


def run(args: argparse.Namespace) -> int:
    command({"do": ROLLBACK})
    return 0
