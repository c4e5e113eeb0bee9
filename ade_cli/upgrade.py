"""``ade upgrade BUNDLE [--canary SHARE]`` and ``ade upgrade --finish``."""

from __future__ import annotations

import argparse
from typing import Any

from ade_base.ports import VARIABLES, Ports
from ade_cli.paths import given_path
from handlers.launch.upgrades import FINISH, UPGRADE
from handlers.processes.channel import ChannelError, ask
from handlers.processes.run_folder import find_service


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "bundle",
        type=given_path,
        nargs="?",
        metavar="BUNDLE",
        help="folder of the new bundle",
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--canary",
        type=_share,
        metavar="SHARE",
        help="give the new bundle this share of the requests for a trial, such as 5%%",
    )
    how.add_argument(
        "--finish",
        action="store_true",
        help="give the canary all requests, and stop the old bundle",
    )
    parser.description = (
        "Replace the bundle of this user's running service, on the ports that ADE_…_PORT set, "
        "without an interruption. The new bundle is started beside the old one; if that fails, "
        "the old one stays. `ade rollback` goes back."
    )


def run(args: argparse.Namespace) -> None:
    if (args.bundle is None) != args.finish:
        raise ChannelError("give either a BUNDLE or --finish")
    if args.finish:
        command({"do": FINISH})
    else:
        bundle = str(args.bundle.absolute())
        command({"do": UPGRADE, "bundle": bundle, "canary": args.canary})


def resumed(args: argparse.Namespace) -> str:
    """What to say after Ctrl-C."""
    return ": the service continues with it, and ade status shows the result"


def command(message: dict[str, Any]) -> None:
    """Have the running service do something, and print its progress.

    Raises:
        ChannelError: no service of this user is on these ports, or it refused.
    """
    ports = Ports.from_environment()
    folder = find_service(ports)
    if folder is None:
        named = ", ".join(f"{VARIABLES[name][0]}={port}" for name, port in vars(ports).items())
        raise ChannelError(f"no service of this user is on {named}")
    ask(folder.control_socket, message, lambda text: print(text, flush=True))


def _share(text: str) -> float:
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise argparse.ArgumentTypeError(
            f"must be above 0 and below 100%, such as 5%, got {text!r}"
        )
    return share
