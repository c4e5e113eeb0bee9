"""``ade compare RECIPE [RECIPE …] --data … --out OUT``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ade_cli.data_options import add_data_arguments, check_outside, dataset_of, say, source_of
from ade_cli.evaluate import add_measure_arguments, measure_options
from ade_model.errors import ConfigError
from serving.files import LOCK, locked
from training.comparison.compare import Job, compare, read_rows
from training.comparison.report import write_comparison
from training.data import CHANNELS, DataError
from training.device import DEVICES, choose_device
from training.loop import RunOptions
from training.measure import Measurer, check_options
from training.metrics.features import FeatureError
from training.recipes import SIZES, recipe, recipe_names
from training.runs import RunError

ERRORS = (RunError, DataError, ConfigError, FeatureError)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipes",
        nargs="*",
        metavar="RECIPE",
        help="systems to train and measure; without any, only the report is written again",
    )
    add_data_arguments(parser, required=True)
    parser.add_argument(
        "--out",
        required=True,
        type=Path,
        metavar="OUT",
        help="the comparison's folder; what earlier calls put there stays in the report, and what is "
        "finished is not done again",
    )
    parser.add_argument(
        "--size", choices=SIZES, default="tiny", help="of the networks (default: %(default)s)"
    )
    parser.add_argument("--image-size", type=int, metavar="PIXELS")
    parser.add_argument(
        "--images",
        type=int,
        default=400_000,
        metavar="N",
        help="training images that each system sees (default: %(default)s)",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        metavar="M",
        help="or the training time of each, whichever ends first",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="S", help="default: 0")
    parser.add_argument("--device", choices=DEVICES, default="auto")
    add_measure_arguments(parser)


def run(args: argparse.Namespace) -> None:
    for name in args.recipes:
        if name not in recipe_names():
            raise RunError(f"no recipe {name!r}; there are {', '.join(recipe_names())}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RunError(
            "ade compare trains each system in one process: start it several times with the same --out instead"
        )
    if not args.recipes and not args.out.is_dir():
        raise RunError(f"{args.out}: there is no such folder to report on")
    budgets = [
        RunOptions(images=args.images, minutes=args.minutes, seed=seed, device=args.device)
        for seed in args.seeds
    ]
    device = choose_device(args.device)
    options = measure_options(args)
    check_outside(args.out, args.data)
    dataset = dataset_of(
        args,
        args.out,
        args.image_size,
        fits=lambda side: [recipe(name, side, CHANNELS, args.size) for name in args.recipes],
    )
    check_options(dataset, options)
    jobs = [
        Job(recipe(name, dataset.image_size, dataset.channels, args.size), budget)
        for budget in budgets
        for name in dict.fromkeys(args.recipes)
    ]
    compare(
        jobs,
        dataset,
        source_of(args),
        args.out,
        options,
        lambda: Measurer(dataset, device, options, say),
        say,
    )
    with locked(args.out / LOCK, wait=True):
        rows = read_rows(args.out)
        if jobs and not rows:
            say("nothing to report yet: other processes are still training or measuring")
        else:
            say(f"{write_comparison(rows, args.out, device)}")
