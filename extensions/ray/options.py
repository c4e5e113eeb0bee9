"""The options that Ray adds to verbs of the core."""

from __future__ import annotations

import argparse

from ade_cli.paths import given


def of_score(parser: argparse.ArgumentParser) -> None:
    """Add the cluster of ``ade score``."""
    parser.add_argument(
        "--address",
        type=given,
        metavar="HOST:PORT",
        help="with --engine ray: a Ray cluster, from one of its nodes (default: this machine)",
    )
