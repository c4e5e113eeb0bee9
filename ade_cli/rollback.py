"""``ade rollback``."""

from __future__ import annotations

import argparse

from ade_cli.upgrade import command, resumed
from handlers.launch.upgrades import ROLLBACK

__all__ = ["add_arguments", "resumed", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Undo the last `ade upgrade` of this user's running service, without an interruption: stop "
        "the canary, or else serve the previous bundle again."
    )


def run(args: argparse.Namespace) -> None:
    command({"do": ROLLBACK})
