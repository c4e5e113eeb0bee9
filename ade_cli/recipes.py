"""``ade recipes``."""

from __future__ import annotations

import argparse

from training.recipes import recipe_names

ERRORS = (ValueError,)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It takes none."""


def run(args: argparse.Namespace) -> None:
    for name, line in recipe_names().items():
        print(f"{name:10s} {line}")
