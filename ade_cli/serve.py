"""``ade serve BUNDLE [BUNDLE …]``."""

from __future__ import annotations

import argparse
from pathlib import Path

from handlers.launch.engines import DEFAULT, ENGINES
from handlers.launch.serve import ERRORS, MAX_SCORE_WORKERS, PROFILE_S, run
from serving.engine.backends import BACKENDS, DEVICES

__all__ = ["ERRORS", "add_arguments", "extra", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "bundles",
        type=Path,
        nargs="+",
        metavar="BUNDLE",
        help="the first is served under the plain names, a further one NAME as NAME-{op}",
    )
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default=DEFAULT,
        help="what serves: asgi needs neither Java nor a model server (default: %(default)s)",
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address of the API and the page; off loopback a token is asked for (default: %(default)s)",
    )
    parser.add_argument(
        "--allowed-hosts",
        default="",
        metavar="NAME[,NAME]",
        help="names by which clients may reach API and page, besides localhost and IP addresses",
    )
    parser.add_argument("--device", choices=DEVICES, default="auto")
    parser.add_argument(
        "--backend", choices=BACKENDS, default=BACKENDS[0], help="default: %(default)s"
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes of each operation, each computing with one thread (default: 1, and for score one a "
        f"core, at most {MAX_SCORE_WORKERS})",
    )
    parser.add_argument(
        "--logs",
        type=Path,
        metavar="DIR",
        help="keep logs there, such as one JSON line a request (default: a folder that is gone afterwards)",
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help=f"say every {PROFILE_S:.0f} seconds where the time of requests went",
    )
    parser.add_argument(
        "--cuda-graphs",
        action="store_true",
        help="on a GPU with onnxruntime: replay recorded kernels (not tried on a GPU yet)",
    )


def extra(args: argparse.Namespace) -> str:
    """The extra of pyproject.toml that these arguments need."""
    return ENGINES[args.engine]
