"""``ade fit DIR``."""

from __future__ import annotations

import argparse
from pathlib import Path

from ade_cli.commands import command
from ade_cli.data_options import check_outside, say
from ade_cli.help_texts import DEVICE
from ade_cli.image_files import check_folder
from ade_cli.paths import given_path, say_what_is_not_followed
from ade_cli.run_checks import check_one_process
from fitting.pipeline import check_plan, fit_folder, has_begun, survey_before
from fitting.plan import Plan, make_plan, read_budget
from fitting.survey import LARGEST, choose_image_size, picture_sizes, sizes_in
from serving.engine.bundle import check_name, check_path, plain_name
from training.data import DataError
from training.datasets.files import part_of
from training.datasets.folder import image_files
from training.device import DEVICES, choose_device
from training.labels import class_folders, why_no_classes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Turn a folder of images into a bundle that can be served: survey the images, choose what "
        "to train, train, measure, export and calibrate it, and write a report. It needs about 800 "
        "images or more; files of more than 16 million pixels (JPEG and HEIC: 51 million) or 16 "
        "MiB are left out. The same command resumes an interrupted run."
    )
    parser.add_argument(
        "folder", type=given_path, metavar="DIR", help="folder of images, searched recursively"
    )
    parser.add_argument(
        "--out",
        type=given_path,
        metavar="OUT",
        help="output folder (default: fits/NAME, with the model's name)",
    )
    parser.add_argument(
        "--name",
        metavar="NAME",
        help="of the model, in answers and in the addresses of further bundles (default: that of "
        "DIR in lower case: letters a to z and digits; other characters become one -, none at the "
        "ends; images if none remain)",
    )
    parser.add_argument(
        "--budget",
        default="1h",
        metavar="TIME",
        help="time for the whole fitting, such as 20m, 2h or 1d (default: %(default)s)",
    )
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="PIXELS",
        help="per side, at most 64 (default: the size that suits most of the images)",
    )
    parser.add_argument(
        "--licence",
        metavar="TEXT",
        help="licence of the weights, for the bundle (default: none)",
    )
    parser.add_argument("--device", choices=DEVICES, default="auto", help=DEVICE)


def resumed(args: argparse.Namespace) -> str:
    """How an interrupted fitting is continued, for the user."""
    out = args.out or Path("fits") / _name(args)
    if has_begun(out) or any((out / "cache").glob("images-*.json")):
        return ": the same command resumes from here"
    return ": the same command reads the images again"


def _name(args: argparse.Namespace) -> str:
    return args.name or plain_name(args.folder.resolve().name)


def run(args: argparse.Namespace) -> None:
    check_one_process("start it without torchrun")
    folder = args.folder.resolve()
    if not folder.is_dir():
        raise DataError(f"{args.folder} is not a folder")
    if args.name is not None:
        check_name(args.name)
    name = _name(args)
    out = args.out or Path("fits") / name
    check_outside(out, str(folder))
    check_path(out)  # the bundle is made in it, after the training
    check_folder(out)
    budget = read_budget(args.budget)
    before = Plan.load(out / "plan.json") if has_begun(out) else None
    say_what_is_not_followed(folder)
    on_gpu = choose_device(args.device).type == "cuda"
    files = image_files(folder)
    names = [path.relative_to(folder).as_posix() for path in files if part_of(path.name) == "train"]
    has_classes = class_folders(names) is not None
    reason = why_no_classes(names)
    if reason is not None:
        say(f"no classes: {reason}")

    def plan_for(side: int) -> Plan:
        return make_plan(
            str(folder), name, side, budget, on_gpu, args.licence, len(files), has_classes
        )

    side = args.image_size
    if side is None and before is not None:
        side = before.image_size
    check_plan(plan_for(LARGEST if side is None else side), out)  # reading may take long
    sizes = sizes_in(survey_before(out))
    if not sizes:
        say(f"looking at {len(files)} files")
        sizes = picture_sizes(files)
    plan = plan_for(choose_image_size(sizes) if side is None else side)
    fitted = fit_folder(plan, files, sizes, out, say)
    print(f"report: {fitted.report}\nserve it: {command('serve', fitted.bundle)}")
