"""``ade calibrate BUNDLE OUT --data …``."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ade_cli.data_options import add_data_arguments, dataset_of, readable, say, was_trained_on
from export.features import FORMAT, SCALES, FeaturesError, FeatureSource
from export.verdict.calibrate import calibrate_bundle
from export.verdict.detector import false_alarm_band
from serving.engine.bundle import BundleError, open_bundle
from serving.verdict.calibration import Calibration, CalibrationError, Calibrations
from serving.verdict.decision import images_needed
from training.data import PARTS, DataError, Dataset
from training.datasets import NAMES
from training.datasets.files import part_of, shuffled
from training.datasets.folder import image_files

ERRORS = (BundleError, CalibrationError, DataError, FeaturesError)

ALPHAS = (0.1, 0.05, 0.01)
ENOUGH = 1000
MAX_IMAGES = 20_000
FIT_SHARE = 0.4  # the rest calibrates; of CIFAR-10's held-out images it is as much


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument(
        "out", type=Path, metavar="OUT", help="the new bundle's folder; must not exist"
    )
    add_data_arguments(parser, required=True)
    parser.add_argument(
        "--features",
        type=Path,
        metavar="MODEL.onnx",
        help="a network whose features tell things apart, such as your classifier, not trained on "
        "any of the images: they join the verdict's statistics, and the network becomes part of "
        "the bundle (default: what the bundle has)",
    )
    parser.add_argument(
        "--features-output",
        metavar="NAME",
        help="the value of that graph that has the features (default: what its last linear layer "
        "takes)",
    )
    parser.add_argument(
        "--features-preprocess",
        metavar="HOW",
        help=f"{FORMAT}: what the graph does not say; SCALE is one of {', '.join(SCALES)}, or "
        "mean and standard deviation of values between 0 and 1, such as "
        "'0.5 0.5 0.5/0.25 0.25 0.25'",
    )


def run(args: argparse.Namespace) -> None:
    bundle = open_bundle(args.bundle)
    if args.features is None and (args.features_output or args.features_preprocess):
        raise FeaturesError("--features-output and --features-preprocess go with --features")
    features = args.features and FeatureSource(
        args.features, args.features_output, args.features_preprocess
    )
    unseen: Iterator[bytes | np.ndarray] = iter(())
    halves: list[Iterator[bytes | np.ndarray]]
    if args.data in NAMES or not Path(args.data).is_dir():
        dataset = dataset_of(args, None, bundle.image_shape[0])
        trained_on = was_trained_on(bundle, dataset.name, dataset.splits)
        halves, name = _rows(dataset, trained_on), dataset.name
        if trained_on:
            tests = dataset.parts["test"]
            unseen = (np.asarray(tests.images[[row]])[0] for row in range(len(tests)))
    else:
        if args.root is not None:
            raise DataError(
                f"--root goes with a named data set ({', '.join(NAMES)}); {args.data!r} is a folder"
            )
        files, name = image_files(Path(args.data)), Path(args.data).resolve().name
        trained_on = was_trained_on(bundle, name)
        if trained_on:
            say(
                f"{name} is what the model was trained on: its parts select and calibrate are taken"
            )
            unseen = _contents(shuffled([path for path in files if part_of(path.name) == "test"]))
        halves = [_contents(half) for half in _files(files, trained_on)]
    fit, calibration = halves
    result = calibrate_bundle(args.bundle, args.out, fit, calibration, name, say, features, unseen)
    _tell(result, open_bundle(args.out).manifest["calibration"])
    say(f"wrote {args.out}; next: ade serve {args.out}")


def _rows(dataset: Dataset, trained_on: bool) -> list[Iterator[bytes | np.ndarray]]:
    """Images to fit and to calibrate on: of the training data its two held-out parts, of any other
    all.
    """
    if trained_on:
        chosen = [
            [(part, row) for row in range(len(dataset.parts[part]))]
            for part in ("select", "calibrate")
        ]
    else:
        rows = [(part, row) for part in PARTS for row in range(len(dataset.parts[part]))]
        chosen = _split(shuffled(rows)[:MAX_IMAGES])
    return [
        (np.asarray(dataset.parts[part].images[[row]])[0] for part, row in half) for half in chosen
    ]


def _files(files: list[Path], trained_on: bool) -> list[list[Path]]:
    """The same of a folder's files."""
    if trained_on:
        return [
            shuffled([path for path in files if part_of(path.name) == part])
            for part in ("select", "calibrate")
        ]
    return _split(shuffled(files)[:MAX_IMAGES])


def _split(items: list[Any]) -> list[list[Any]]:
    first = round(FIT_SHARE * len(items))
    return [items[:first], items[first:]]


def _contents(paths: list[Path]) -> Iterator[bytes | np.ndarray]:
    return readable(paths[:MAX_IMAGES])


def _tell(calibrations: Calibrations, about: dict[str, Any]) -> None:
    """What users may expect of the false-alarm rate that they will ask for."""
    assert calibrations.exact is not None and calibrations.resized is not None
    both = calibrations.exact is calibrations.resized
    _tell_of(
        calibrations.exact,
        "images of the model's size and resized ones" if both else "images of the model's size",
    )
    if not both:
        _tell_of(calibrations.resized, "resized images")
        simulated = about["resized"]["resized_and_back"]
        if simulated:
            say(
                f"{simulated} of them have the model's size and were enlarged first, for want of larger ones: of pictures "
                "that come from elsewhere, more may be rejected"
            )
    if len(calibrations.exact.scores) < ENOUGH * (1 - FIT_SHARE):
        say(
            f"warning: with fewer than {ENOUGH} images in all, verdicts are coarse, and the density behind them is rough"
        )


def _tell_of(calibration: Calibration, what: str) -> None:
    count = len(calibration.scores)
    say(
        f"{what}: calibrated on {count} images, p-values from {calibration.smallest_p_value:.2g} on"
    )
    for alpha in ALPHAS:
        low, high = false_alarm_band(count, alpha)
        if high == 0:
            say(
                f"warning: at alpha {alpha} there is no verdict with so few; that takes {images_needed(alpha)} "
                "calibration images at least"
            )
        else:
            say(
                f"at alpha {alpha} between {low:.4f} and {high:.4f} of images like these will be rejected (95 % band)"
            )
