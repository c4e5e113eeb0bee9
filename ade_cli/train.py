"""``ade train RECIPE --data … --out RUN``."""

from __future__ import annotations

import argparse
import json

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
from ade_cli.recipe_changes import change
from ade_cli.run_checks import check_same_data, size_checked
from training.config import SIZES, TrainConfig
from training.data import CHANNELS
from training.datasets import image_size_of
from training.device import DEVICES, choose_device
from training.loop import train
from training.recipes import recipe, recipe_names
from training.run_options import NO_LIMIT, PRECISIONS, RunOptions
from training.run_start import check_folder, check_start, last_options, read_started
from training.runs import RunError, alone_in, checkpoint_folders, read_json
from training.step import TrainingDiverged

IMAGES = 1_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe", choices=list(recipe_names()), help="system to train; see `ade recipes`"
    )
    add_data_arguments(parser, required=True)
    parser.add_argument(
        "--out", required=True, type=given_path, metavar="RUN", help="the run's folder"
    )
    parser.add_argument(
        "--size",
        choices=SIZES,
        default="small",
        help="size of the networks: tiny for an hour on two cores, small for a day, paper for a "
        "GPU (default: %(default)s)",
    )
    add_image_size(parser)
    parser.add_argument(
        "--images",
        type=int,
        metavar="N",
        help=f"training images to see, over all processes (default: {IMAGES:,}, or no limit with "
        "--minutes; with --resume, as before)",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        metavar="M",
        help="end after this training time (default: no limit; with --resume and without "
        "--images, as before)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        help="seed of weights, order and noise (default: 0; with --resume, as before)",
    )
    parser.add_argument("--resume", action="store_true", help="resume the run in --out")
    parser.add_argument(
        "--device", choices=DEVICES, help=f"{DEVICE}; with --resume, that of the run unless given"
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="precision of the networks (default: auto, or that of the run that is resumed); "
        "log-densities are always float32",
    )
    parser.add_argument(
        "--checkpoint-steps",
        type=int,
        metavar="N",
        help="also write a checkpoint every N steps, beside those every five minutes (default: "
        f"{RunOptions.checkpoint_steps}, or as in the run that is resumed)",
    )
    parser.add_argument(
        "--evaluate-steps",
        type=int,
        metavar="N",
        help="steps between evaluations of held-out images and samples (default: "
        f"{RunOptions.evaluate_steps}, or as in the run that is resumed)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check the options and the files that they name, print the configuration and write "
        "nothing",
    )
    parser.add_argument(
        "--set",
        dest="changes",
        type=change,
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="change fields of the recipe, such as batch_size=32 widths=96,64,32 flips=false, or "
        "d_widths=64,128,256 of the discriminator; --dry-run prints all values, and `python -m "
        "pydoc training.config` and `python -m pydoc ade_model.config` describe them",
    )


def resumed(args: argparse.Namespace) -> str:
    """How an interrupted run is continued, for the user."""
    if args.dry_run:
        return ""
    if checkpoint_folders(args.out):
        return "; --resume continues from the last checkpoint"
    if (args.out / "run.json").is_file():
        return "; there is no checkpoint yet: --resume starts from the beginning"
    return ": the same command starts again"


def run(args: argparse.Namespace) -> None:
    before = last_options(args.out) if args.resume else {}
    if before and args.seed not in (None, seed := before.get("seed")):
        raise RunError(f"--seed must be that of the run, {seed}, with --resume, got {args.seed}")
    if before and args.image_size is None:  # the folder may have another first image now
        args.image_size = TrainConfig.from_dict(read_started(args.out)["config"]).model.image_size
    keeps_minutes = args.images is None and args.minutes is None
    default = IMAGES if args.minutes is None else NO_LIMIT
    options = RunOptions(
        images=before.get("images", default) if args.images is None else args.images,
        # With a larger number of images, a time that is spent must not end the run at once.
        minutes=before.get("minutes") if keeps_minutes else args.minutes,
        seed=args.seed or 0,
        precision=args.precision or before.get("precision", PRECISIONS[0]),
        **{
            name: before.get(name, getattr(RunOptions, name)) if given is None else given
            for name, given in (
                ("device", args.device),
                ("checkpoint_steps", args.checkpoint_steps),
                ("evaluate_steps", args.evaluate_steps),
            )
        },
    )
    changes = dict(args.changes)
    check_outside(args.out, args.data)
    make = size_checked(
        args, lambda side: recipe(args.recipe, side, CHANNELS, args.size, **changes)
    )
    if (args.out / "run.json").is_file() and not args.resume:  # check_folder cannot name --resume
        raise RunError(
            f"{args.out} holds a run: continue it with --resume, or choose another folder"
        )
    check_folder(args.out, args.resume)
    if args.resume and (args.out / "data.json").is_file():
        recorded = read_json(args.out / "data.json", "data")["data"]
        check_same_data({args.out: recorded}, args)
    if args.dry_run:
        config = make(image_size_of(args.data, args.root, args.image_size))
        check_start(config, args.out, options, args.resume)
        print(json.dumps(config.to_dict(), indent=2))
        return
    choose_device(options.device)

    def fits(side: int) -> None:
        check_start(make(side), args.out, options, args.resume)

    with alone_in(args.out):
        dataset = dataset_of(args, args.out, args.image_size, fits=fits)
        config = recipe(args.recipe, dataset.image_size, dataset.channels, args.size, **changes)
        try:
            progress = train(config, dataset, args.out, options, args.resume, source_of(args))
        except TrainingDiverged as error:
            raise TrainingDiverged(
                f"{error}; --resume would repeat the same steps: start again with another --out, "
                "and another --seed or lower learning rates"
            ) from error
    spent = progress.seconds / 60
    say(f"{progress.images:,} images in {spent:.1f} minutes: {args.out / 'report.md'}")
