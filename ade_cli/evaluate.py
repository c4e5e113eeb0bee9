"""``ade evaluate RUN_OR_BUNDLE``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ade_cli.data_options import add_data_arguments, dataset_of_run, say, source_of
from ade_cli.help_texts import DEVICE, RUN_OR_BUNDLE
from ade_cli.paths import given_path
from ade_model.checkpoint import load_model, read_config
from training.data import PARTS, ImageSet
from training.device import DEVICES, choose_device
from training.measure import MeasureOptions, Measurer, check_networks
from training.runs import RunError, latest_checkpoint, read_json, run_of, write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=given_path, metavar="RUN_OR_BUNDLE", help=RUN_OR_BUNDLE)
    add_data_arguments(parser, required=False)
    parser.add_argument(
        "--part",
        choices=PARTS,
        default="test",
        help="part of the data set to measure (default: %(default)s); figures of other parts, or "
        "of other data than the run's own, are printed but not stored for `ade export`",
    )
    parser.add_argument("--images", type=int, metavar="N", help="use the part's first N images")
    add_measure_arguments(parser)
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the noise (default: %(default)s)"
    )
    parser.add_argument("--device", choices=DEVICES, default="auto", help=DEVICE)


def add_measure_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that `ade evaluate` and `ade compare` share."""
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
        help="weights of a CIFAR-10 ResNet-20, for distances in its feature space (not the FID), "
        "class score and GAN-train",
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
        help="weights of the FID's Inception, or `download`, for FID with 5,000, 10,000 and 50,000 "
        "samples, KID and Inception score",
    )


def measure_options(
    args: argparse.Namespace, part: str = "test", images: int | None = None, seed: int = 0
) -> MeasureOptions:
    """Options from the arguments of :func:`add_measure_arguments` and those that differ.

    Raises:
        RunError: a count is out of range.
    """
    for name, least in (("draws", 1), ("samples", 20), ("bound_images", 2)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise RunError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    if not 0 <= seed < 2**63:
        raise RunError(f"--seed must be from 0 to 2^63 - 1, got {seed}")
    return MeasureOptions(
        part=part,
        images=images,
        draws=args.draws,
        bound_images=args.bound_images,
        resnet20=args.resnet20,
        efficientnet=args.efficientnet,
        inception=args.inception,
        samples=args.samples,
        efficientnet_samples=args.samples // 2,
        seed=seed,
    )


def run(args: argparse.Namespace) -> None:
    if args.images is not None and args.images < 2:
        raise RunError(f"--images must be at least 2, got {args.images}")
    options = measure_options(args, args.part, args.images, args.seed)
    device = choose_device(args.device)
    check_networks(options)
    folder = latest_checkpoint(args.run)
    model, about = load_model(folder).to(device), read_config(folder)
    run_folder = run_of(folder)
    dataset = dataset_of_run(args, run_folder, model.config.image_size)
    measurer = Measurer(dataset, device, options, say)
    result = measurer.measure(model, about)
    print(json.dumps(result, indent=2))
    if run_folder == folder:
        return
    is_own = _is_own(args, run_folder)
    if is_own and args.part != "train":
        copies = dataset.copies_of_training(ImageSet(measurer.images))
        if copies:
            say(f"{copies} of {len(measurer.images)} images are copies of training images")
    path = folder / "evaluation.json"  # `ade export` copies the figures to the manifest
    if args.part != "test" or not is_own:
        say(f"{path} is left as it is: it is for the part test of the run's own data set")
    elif not folder.is_dir():  # a run that is still trained keeps its newest checkpoints alone
        say(f"{folder} was replaced by a newer checkpoint meanwhile: the figures are only printed")
    else:
        _store(result, path)


def _is_own(args: argparse.Namespace, run: Path) -> bool:
    """Whether the options name the data set that a run was trained on."""
    if args.data is None:
        return True
    source = run / "data.json"
    return source.is_file() and read_json(source, "data")["data"] == source_of(args)["data"]


def _store(result: dict[str, Any], path: Path) -> None:
    """Write figures, beside those that were measured before on the same images.

    Figures of more images, or of the same images with another seed, are kept instead, and so is a
    figure that needed more samples or images.
    """
    before = read_json(path) if path.is_file() else {}
    if any(before.get(key) != result[key] for key in ("data", "part")):
        before = {}
    if result["images"] < before.get("images", 0):
        say(f"{path} is kept: its figures are of {before['images']} images, not {result['images']}")
        return
    is_same = all(before.get(key) == result[key] for key in ("split", "images"))
    if is_same and before.get("seed", result["seed"]) != result["seed"]:
        say(f"{path} is kept: its figures are of seed {before['seed']}, not {result['seed']}")
        return
    if is_same and "seed" in before:
        kinds, found = before.get("distances", {}), result.get("distances", {})
        distances = {k: _fuller(kinds.get(k, {}), found.get(k, {})) for k in kinds | found}
        result = {**_fuller(before, result), **({"distances": distances} if distances else {})}
    write_json(path, result)


def _fuller(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Figures by name: of two of the same, that of more samples or images, and else the new one."""

    def count(figure: Any) -> int:
        counts: dict[str, int] = figure if isinstance(figure, dict) else {}
        return counts.get("samples", counts.get("images", 0))

    return {
        **before,
        **{name: its for name, its in now.items() if count(its) >= count(before.get(name))},
    }
