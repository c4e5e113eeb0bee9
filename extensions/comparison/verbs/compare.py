"""``ade compare RECIPE [RECIPE …] --data … --out OUT`` and ``ade compare --out OUT``."""

from __future__ import annotations

import argparse

import torch

from ade_base.files import LOCK, locked
from ade_cli.data_options import (
    add_data_arguments,
    add_image_size,
    check_outside,
    dataset_of,
    say,
    source_of,
)
from ade_cli.help_texts import DEVICE
from ade_cli.paths import given_path
from ade_cli.run_checks import check_one_process, check_same_data, size_checked
from extensions.comparison.compare import Comparison, Job
from extensions.comparison.measure import MeasureOptions, check_networks, check_options
from extensions.comparison.report import write_comparison
from extensions.comparison.rows import read_rows, recorded_data
from training.config import SIZES
from training.data import CHANNELS, DataError
from training.device import DEVICES, choose_device
from training.recipes import recipe, recipe_names
from training.run_options import RunOptions
from training.runs import RunError

FAILED = 1  # exit status


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        f"{parser.description} Exit status: 0; 2 for an error; {FAILED} if a system failed."
    )
    parser.add_argument(
        "recipes",
        nargs="*",
        metavar="RECIPE",
        help="systems to train and measure; if none is given, only the report is written",
    )
    add_data_arguments(parser, required=False, otherwise="required if a RECIPE is given")
    parser.add_argument(
        "--out",
        required=True,
        type=given_path,
        metavar="OUT",
        help="the comparison's folder; runs of earlier calls stay in the report, and finished work "
        "is not repeated",
    )
    parser.add_argument(
        "--size",
        choices=SIZES,
        default="tiny",
        help="size of the networks (default: %(default)s)",
    )
    add_image_size(parser)
    parser.add_argument(
        "--images",
        type=int,
        default=400_000,
        metavar="N",
        help="training images that each model sees; a discriminator sees a further batch in each "
        "of its steps (default: %(default)s)",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        metavar="M",
        help="end the training of each system after this time too",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        action="extend",
        nargs="+",
        metavar="S",
        help="train each system with each of these seeds (default: 0)",
    )
    parser.add_argument("--device", choices=DEVICES, default="auto", help=DEVICE)
    _add_measures(parser)


def _add_measures(parser: argparse.ArgumentParser) -> None:
    """Add the options of the measures."""
    parser.add_argument(
        "--draws",
        type=int,
        default=8,
        metavar="K",
        help="draws of the importance-weighted bound (default: %(default)s)",
    )
    parser.add_argument(
        "--bound-images",
        type=int,
        metavar="N",
        help="use the first N images for that bound and for reconstructions",
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=10_000,
        metavar="N",
        help="samples for the feature space of ResNet-20 (default: %(default)s)",
    )
    parser.add_argument(
        "--resnet20",
        type=given_path,
        metavar="NPZ",
        help="weights of a CIFAR-10 ResNet-20, for distances in its feature space (not the FID) "
        "and GAN-train",
    )
    parser.add_argument(
        "--efficientnet",
        action="store_true",
        help="measure distances in the feature space of EfficientNet-Lite0 (not the FID), with "
        "half as many samples",
    )
    parser.add_argument(
        "--inception",
        metavar="PATH",
        help="weights of the FID's Inception, or `download`, for the FID of 50,000 samples from "
        "training images",
    )


def _measure_options(args: argparse.Namespace) -> MeasureOptions:
    """Options from the arguments of :func:`_add_measures`.

    Raises:
        RunError: a count is out of range.
    """
    for name, least in (("draws", 1), ("samples", 20), ("bound_images", 2)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise RunError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    return MeasureOptions(
        draws=args.draws,
        bound_images=args.bound_images,
        resnet20=args.resnet20,
        efficientnet=args.efficientnet,
        inception=args.inception,
        samples=args.samples,
    )


def resumed(args: argparse.Namespace) -> str:
    """How an interrupted comparison is continued, for the user."""
    return ": the same command resumes from here"


def run(args: argparse.Namespace) -> int:
    for name in args.recipes:
        if name not in recipe_names():
            raise RunError(f"RECIPE must be one of {', '.join(recipe_names())}, got {name!r}")
    check_one_process("start it several times with the same --out instead")
    device = choose_device(args.device)
    failed = ""
    if args.recipes:
        failed = _train(args, device)
    elif not args.out.is_dir():
        raise RunError(f"{args.out}: there is no such folder to report on")
    with locked(args.out / LOCK, wait=True):
        rows = read_rows(args.out)
        if args.recipes and not rows:
            say("nothing to report yet: other processes are still training or measuring")
        else:
            say(f"{write_comparison(rows, args.out, device)}")
    if failed:
        say(failed)
    return FAILED if failed else 0


def _train(args: argparse.Namespace, device: torch.device) -> str:
    """Train and measure the systems that are not finished; returns which failed, if any."""
    if args.data is None:
        raise DataError("--data is required: it names the images to train on")
    budgets = [
        RunOptions(images=args.images, minutes=args.minutes, seed=seed, device=args.device)
        for seed in args.seeds or [0]
    ]
    options = _measure_options(args)
    check_networks(options)
    check_outside(args.out, args.data)
    check_same_data(recorded_data(args.out), args)
    dataset = dataset_of(
        args,
        args.out,
        args.image_size,
        fits=size_checked(
            args, lambda side: [recipe(name, side, CHANNELS, args.size) for name in args.recipes]
        ),
    )
    check_options(dataset, options)
    jobs = [
        Job(recipe(name, dataset.image_size, dataset.channels, args.size), budget)
        for budget in budgets
        for name in dict.fromkeys(args.recipes)
    ]
    failed = Comparison(dataset, source_of(args), args.out, options, device, say).run(jobs)
    return f"{len(failed)} of {len(jobs)} systems failed: {', '.join(failed)}" if failed else ""
