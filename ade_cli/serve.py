"""``ade serve [BUNDLE …]``."""

from __future__ import annotations

import argparse

from ade_base.extensions import engine_help
from ade_base.ports import LOOPBACK, VARIABLES
from ade_cli.help_texts import DEVICE
from ade_cli.paths import SHIPPED, given_bundle, given_path
from handlers.front.settings import MIN_TOKEN, TOKEN_VARIABLE
from handlers.launch import serve
from handlers.launch.engines import ENGINES, default_engine
from handlers.launch.serve import MAX_SCORE_WORKERS
from handlers.processes.supervision import LaunchError
from serving.engine.backends import BACKENDS, DEVICES

__all__ = ["add_arguments", "extra", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    ports = {name: f"{variable} (default: {port})" for name, (variable, port) in VARIABLES.items()}
    parser.description = (
        "Serve a bundle over HTTP, with a web page. Environment variables choose the ports: "
        f"{ports['inference']} of the API, {ports['ui']} of the page, {ports['metrics']} of the "
        f"metrics. With a HOST other than {' and '.join(LOOPBACK)}, clients need the token in "
        f"{TOKEN_VARIABLE}, of at least {MIN_TOKEN} characters; without it each start makes a new "
        "one, in a file that the start message names."
    )
    parser.add_argument(
        "bundles",
        type=given_bundle,
        nargs="*",
        default=[SHIPPED],
        metavar="BUNDLE",
        help="folder of a bundle (default: the shipped one, pretrained/cifar10); its operations "
        "are served at /predictions/OPERATION, those of each further bundle at "
        "/predictions/NAME-OPERATION, with the name in its manifest.json",
    )
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default=default_engine(),
        help=f"what serves: {engine_help(ENGINES)} (default: %(default)s)",
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address of the API and the page; addresses other than 127.0.0.1 and localhost "
        "require a token (default: %(default)s)",
    )
    parser.add_argument(
        "--allowed-hosts",
        default="",
        metavar="NAME[,NAME]",
        help="names by which clients may address API and page, besides localhost, IP addresses and "
        "HOST",
    )
    parser.add_argument(
        "--expose-metrics",
        action="store_true",
        help="serve the metrics on HOST too, with the token, for a Prometheus on another machine "
        "(default: on loopback alone)",
    )
    parser.add_argument("--device", choices=DEVICES, default="auto", help=DEVICE)
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        default=BACKENDS[0],
        help="runtime that computes the bundle's graphs (default: %(default)s)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes per operation, each with one computing thread (default: 1, and for score "
        f"one per core, at most {MAX_SCORE_WORKERS})",
    )
    parser.add_argument(
        "--logs",
        type=given_path,
        metavar="DIR",
        help="folder for the logs of this service alone, such as one JSON line per request "
        "(default: a temporary folder)",
    )
    parser.add_argument(
        "--cuda-graphs",
        action="store_true",
        help="replay recorded kernels, on a GPU with onnxruntime; implies --device cuda (not "
        "tested on a GPU yet)",
    )


def extra(args: argparse.Namespace) -> str:
    """The extras of pyproject.toml that these arguments need, separated by commas."""
    # Of the extras with PyTorch, train goes with each ONNX Runtime.
    return str(ENGINES[args.engine].extra) + (",train" if args.backend == "torchscript" else "")


def run(args: argparse.Namespace) -> None:
    if args.bundles == [SHIPPED] and not SHIPPED.is_dir():
        raise LaunchError("give BUNDLE, the folder of a bundle: this installation has none")
    if args.cuda_graphs:
        if args.device == "cpu" or args.backend != "onnxruntime":
            raise LaunchError(
                "--cuda-graphs needs --device cuda and --backend onnxruntime, got --device "
                f"{args.device} and --backend {args.backend}"
            )
        args.device = "cuda"  # so that without a GPU nothing starts
    serve.run(args)
