"""``ade decompress ARCHIVE.ade OUT --bundle BUNDLE``."""

from __future__ import annotations

import argparse
import sys

from tqdm import tqdm

from ade_cli.image_files import check_parent
from ade_cli.paths import given_path
from ade_cli.progress import progress_bar
from extensions.codec.decompress import decompress
from serving.engine.bundle import open_bundle

LOST = 3  # exit status


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Restore the images of an archive that ade compress wrote with the same bundle. Exit "
        f"status: 0; 2 for an error; {LOST} where only a part of the images came back."
    )
    parser.add_argument(
        "archive", type=given_path, metavar="ARCHIVE.ade", help="an archive of ade compress"
    )
    parser.add_argument(
        "out",
        type=given_path,
        metavar="OUT",
        help="a new folder, or a new FILE.npy if an array was compressed",
    )
    parser.add_argument(
        "--bundle", type=given_path, required=True, help="the bundle that compressed it"
    )


def run(args: argparse.Namespace) -> int:
    check_parent(args.out)
    bundle = open_bundle(args.bundle)
    with progress_bar() as progress:

        def warn(line: str) -> None:
            tqdm.write(f"warning: {line}", file=sys.stderr)

        result = decompress(args.archive, args.out, bundle, warn, progress)
    print(f"{args.out}: {result.restored} of {result.images} images")
    return LOST if result.lost else 0
