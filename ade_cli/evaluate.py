"""``ade evaluate RUN_OR_BUNDLE``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ade_base.panel import panel_rows
from ade_base.reports import markdown_table
from ade_cli.data_options import add_data_arguments, dataset_of_run, say, source_of
from ade_cli.help_texts import DEVICE, RUN_OR_BUNDLE
from ade_cli.paths import given_bundle
from ade_model.checkpoint import load_model, read_config
from training.device import DEVICES, choose_device
from training.measure import FINAL, SELECT, Measurer
from training.runs import RunError, latest_checkpoint, read_json, run_of, write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=given_bundle, metavar="RUN_OR_BUNDLE", help=RUN_OR_BUNDLE)
    add_data_arguments(parser, required=False)
    parser.add_argument(
        "--final",
        action="store_true",
        help="measure on the part test, for reported figures; choose between models without it, on "
        "the part select",
    )
    parser.add_argument("--images", type=int, metavar="N", help="use the part's first N images")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the noise (default: %(default)s)"
    )
    parser.add_argument("--device", choices=DEVICES, default="auto", help=DEVICE)


def run(args: argparse.Namespace) -> None:
    if args.images is not None and args.images < 2:
        raise RunError(f"--images must be at least 2, got {args.images}")
    if not 0 <= args.seed < 2**63:
        raise RunError(f"--seed must be from 0 to 2^63 - 1, got {args.seed}")
    device = choose_device(args.device)
    folder = latest_checkpoint(args.run)
    model, about = load_model(folder).to(device), read_config(folder)
    run_folder = run_of(folder)
    dataset = dataset_of_run(args, run_folder, model.config.image_size)
    part = FINAL if args.final else SELECT
    measurer = Measurer(dataset, device, part, args.images, args.seed, say)
    result = measurer.measure(model, about)
    print(json.dumps({part: result}, indent=2))
    header = [f"{result['images']:,} images of {result['split']}", "figure", ""]
    for line in markdown_table(header, panel_rows(result["figures"])):
        say(line)
    if run_folder == folder:
        return
    is_own = _is_own(args, run_folder)
    if is_own:
        copies = dataset.copies_of_training(measurer.held_out)
        if copies:
            say(f"{copies} of {result['images']} images are copies of training images")
    path = folder / "evaluation.json"  # `ade export` copies the figures to the manifest
    if not is_own:
        say(f"{path} is left as it is: it is for the run's own data set")
    elif not folder.is_dir():  # a run that is still trained keeps its newest checkpoints alone
        say(f"{folder} was replaced by a newer checkpoint meanwhile: the figures are only printed")
    else:
        _store(result, path, part)


def _is_own(args: argparse.Namespace, run: Path) -> bool:
    """Whether the options name the data set that a run was trained on."""
    if args.data is None:
        return True
    source = run / "data.json"
    return source.is_file() and read_json(source, "data")["data"] == source_of(args)["data"]


def _store(result: dict[str, Any], path: Path, part: str) -> None:
    """Write the figures of a part, beside those of others.

    Figures of more images, or of the same images with another seed, are kept instead.
    """
    parts = read_json(path) if path.is_file() else {}
    if "data" in parts:  # one part's figures, by version 0.1 or 0.2
        parts = {}
    before = parts.get(part)
    if before is not None and before["split"] == result["split"]:
        why = ""
        if result["images"] < before["images"]:
            why = f"{before['images']} images, not {result['images']}"
        elif result["images"] == before["images"] and result["seed"] != before["seed"]:
            why = f"seed {before['seed']}, not {result['seed']}"
        if why:
            say(f"{path} is kept: its figures of {part} are of {why}")
            return
    write_json(path, {**parts, part: result})
