"""``ade publish BUNDLE``."""

from __future__ import annotations

import argparse

from ade_base.ports import VARIABLES, Ports
from ade_cli.paths import given_bundle
from handlers.launch.publish import PUBLISH
from handlers.processes.channel import ChannelError, ask
from handlers.processes.run_folder import find_service


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "bundle", type=given_bundle, metavar="BUNDLE", help="folder of the bundle to serve"
    )
    parser.description = (
        "Replace the bundle of this user's running service, on the ports that ADE_…_PORT set, "
        "without an interruption. The new bundle is started beside the old one; if that fails, "
        "the old one stays. To go back, publish the old bundle again."
    )


def run(args: argparse.Namespace) -> None:
    ports = Ports.from_environment()
    folder = find_service(ports)
    if folder is None:
        named = ", ".join(f"{VARIABLES[name][0]}={port}" for name, port in vars(ports).items())
        raise ChannelError(f"no service of this user is on {named}")
    message = {"do": PUBLISH, "bundle": str(args.bundle.absolute())}
    ask(folder.control_socket, message, lambda text: print(text, flush=True))


def resumed(args: argparse.Namespace) -> str:
    """What to say after Ctrl-C."""
    return ": the service continues with it, and ade status shows the result"
