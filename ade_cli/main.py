"""``ade``: finds the verb and runs it."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

VERBS = {
    "fit": "turn a folder of images into a bundle that can be served, in one command",
    "recipes": "list the systems that can be trained",
    "train": "train a model on CIFAR-10 or on a folder of images",
    "evaluate": "measure a run or a bundle: likelihood, reconstructions, samples",
    "compare": "train several systems under one budget, measure them alike, and write one report",
    "export": "turn a run's checkpoint into a bundle that can be served",
    "calibrate": "fit a bundle's verdict to held-out images and calibrate it, into a new bundle",
    "ood-bench": "measure how well a bundle's verdict tells strangers from usual images",
    "sample": "draw samples into a picture or an array",
    "encode": "write the latents of image files",
    "reconstruct": "encode and decode image files",
    "score": "score image files, or a folder of any size into a table",
    "serve": "serve a bundle over HTTP, with a web page",
    "status": "say how the service on this machine is",
}
RESUMED = ("fit", "score", "compare")


def parse(given: list[str]) -> argparse.Namespace:
    """What a command line says; ``verb`` is the verb."""
    parser = argparse.ArgumentParser(prog="ade", description="Train, export and serve AV-ADE image models.")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, line in VERBS.items():
        verb = verbs.add_parser(name, help=line, description=line[0].upper() + line[1:] + ".")
        if name in given[:1]:  # only the verb that runs is imported: serving needs no training packages
            _module(name).add_arguments(verb)
    return parser.parse_args(given)


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; returns the exit status."""
    args = parse(sys.argv[1:] if arguments is None else arguments)
    module = _module(args.verb)
    try:
        return int(module.run(args) or 0)
    except module.ERRORS as error:
        print(f"ade {args.verb}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"ade {args.verb}: interrupted" + (": the same command goes on from here" if args.verb in RESUMED else ""),
              file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.filename is None:
            raise
        print(f"ade {args.verb}: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2


def _module(verb: str) -> ModuleType:
    try:
        return importlib.import_module(f"ade_cli.{verb.replace('-', '_')}")
    except ModuleNotFoundError as error:
        if (Path(__file__).parents[1] / str(error.name).partition(".")[0]).is_dir():
            raise  # one of ours: a fault, not something to install
        print(f"ade {verb}: {error.name} is not installed. Serving needs less than training: in the project's folder, "
              "`make fit` installs all, and so does pip install --editable '.[train,export,evaluate]'", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    sys.exit(main())
