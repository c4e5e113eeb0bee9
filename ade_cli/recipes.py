"""``ade recipes``."""

from __future__ import annotations

import argparse

from training.config import SIZES
from training.recipes import recipe, recipe_names
from training.weights import count_weights


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights", action="store_true", help="count each system's weights for 32x32 colour images"
    )


def run(args: argparse.Namespace) -> None:
    for name, line in recipe_names().items():
        print(f"{name:14s} {line}")
        if args.weights:
            for size in SIZES:
                counts = count_weights(recipe(name, 32, 3, size))
                print(
                    f"{'':14s}   {size:6s} {counts.model:>11,} weights, "
                    f"{100 * counts.flow_share:5.1f} % of them in the flow; "
                    f"discriminator {counts.discriminator:,}"
                )
