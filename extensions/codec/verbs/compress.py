"""``ade compress IMAGES OUT.ade --bundle BUNDLE``."""

from __future__ import annotations

import argparse
import os
import sys

from ade_base.messages import counted
from ade_cli.commands import command
from ade_cli.image_files import FileError, check_parent, left_out
from ade_cli.paths import given_path, say_what_is_not_followed
from ade_cli.progress import progress_bar
from extensions.codec.compress import compress
from extensions.codec.networks import CODEC_NAME
from extensions.codec.sources import open_source
from serving.engine.bundle import open_bundle

INCOMPLETE = 3  # exit status


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Compress images without loss, with a bundle's model: an archive of images like those that "
        "the model was trained on is as small as their likelihood promises. Only the same bundle "
        "restores them, on a processor of the same kind. The model codes PNG files of its size "
        "with 8-bit RGB or grey pixels and no metadata; all others, and those that it codes worse, "
        "are stored as the files they are. The same command resumes where it stopped. Files that "
        "cannot be read are left out and named on standard error. Exit status: 0; 2 for an error; "
        f"{INCOMPLETE} if files were left out."
    )
    parser.add_argument(
        "images",
        type=given_path,
        metavar="IMAGES",
        help="a folder (searched recursively), or FILE.npy",
    )
    parser.add_argument(
        "out", type=given_path, metavar="OUT.ade", help="the archive; must not exist"
    )
    parser.add_argument(
        "--bundle",
        type=given_path,
        required=True,
        help="folder of a bundle with a codec, which ade export --with-codec adds",
    )


def resumed(args: argparse.Namespace) -> str:
    """How an interrupted compression is continued, for the user."""
    return ": the same command resumes from here"


def run(args: argparse.Namespace) -> int:
    if not args.images.exists():
        raise FileError(f"{args.images}: there is no such file or folder")
    check_parent(args.out)
    bundle = open_bundle(args.bundle)
    if "score" in bundle.operations and not bundle.has(CODEC_NAME):
        copy = command("export", "--with-codec", args.bundle, "OUT")
        raise FileError(f"{args.bundle} has no codec. Make a copy with one: {copy}")
    lacks_pictures = say_what_is_not_followed(args.images)
    if args.images.is_dir():
        print(f"looking for files in {args.images} that cannot be read", file=sys.stderr)
    source = open_source(args.images)
    for path, reason in source.left_out:
        left_out(path, reason)
    others = 0
    if args.images.is_dir():
        found = sum(len(names) for _, _, names in os.walk(args.images))
        others = max(0, found - source.count - len(source.left_out))
    with progress_bar() as progress:
        report = compress(source, args.out, bundle, progress)
    for line in report.lines():
        print(line)
    if source.left_out:
        missing = counted(len(source.left_out), "file")
        print(f"warning: {missing} could not be read: not in {args.out}", file=sys.stderr)
    if others:
        print(f"{counted(others, 'file')} of other kinds: not in {args.out}", file=sys.stderr)
    return INCOMPLETE if source.left_out or lacks_pictures else 0
