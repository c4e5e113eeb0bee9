"""``ade calibrate BUNDLE OUT --data …`` and ``ade calibrate BUNDLE --into BUNDLE --name …``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ade_cli.advice import advice
from ade_cli.data_options import (
    add_data_arguments,
    dataset_of,
    part_in,
    percent,
    readable,
    say,
    was_trained_on,
)
from export.feature_source import FORMAT, SCALES, FeaturesError, FeatureSource
from export.verdict.calibrate import calibrate_bundle, calibrate_into
from serving.engine.bundle import FEATURES_NAME, Bundle, BundleError, open_bundle
from serving.verdict.calibration import DEFAULT, Calibration, CalibrationError, Calibrations
from serving.verdict.decision import images_needed
from serving.verdict.false_alarms import false_alarm_band
from training.data import PARTS, DataError, Dataset
from training.datasets import NAMES
from training.datasets.files import shuffled
from training.datasets.folder import image_files

ERRORS = (BundleError, CalibrationError, DataError, FeaturesError)

HELD_OUT = ("select", "calibrate", "test")  # to fit to, to calibrate on, and never used
ALPHAS = (0.1, 0.05, 0.01)
MAX_IMAGES = 20_000
FIT_SHARE = 0.4  # as in CIFAR-10's held-out parts; the other images calibrate

Images = Callable[[], Iterator[bytes | np.ndarray]]  # may be read more than once


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Calibrate a bundle's gate on your images: afterwards it accepts images like them. No "
        "network is trained. Two fifths of the images fit the density of statistics, the others "
        "set the false-alarm rate; 1,000 or more are advisable. About 8 of 100 files of a folder, "
        "and the part test of a named data set, are left out for ade ood-bench. Images of another "
        "size than the model's are resized. The result is a new bundle (OUT), or a further "
        "calibration in a bundle (--into, --name). Prints the false-alarm rates to expect and the "
        "share of corrupted images that is rejected."
    )
    parser.add_argument(
        "bundle", type=Path, metavar="BUNDLE", help="folder of a bundle, such as pretrained/cifar10"
    )
    parser.add_argument(
        "out", type=Path, nargs="?", metavar="OUT", help="folder of the new bundle; must not exist"
    )
    parser.add_argument(
        "--into",
        type=Path,
        metavar="BUNDLE",
        help="instead of OUT: add the calibration to this bundle of the same model, as --name; a "
        "service that runs with it takes the calibration over within seconds",
    )
    parser.add_argument(
        "--name",
        metavar="NAME",
        help='with --into: requests ask for it with "calibration": "NAME"; one of this name is '
        f"replaced; {DEFAULT!r} judges the requests that name none",
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
    if (args.out is None) == (args.into is None):
        raise CalibrationError("give either OUT, a new bundle, or --into BUNDLE")
    if (args.into is None) != (args.name is None):
        raise CalibrationError("--into BUNDLE and --name NAME go together")
    features = _features(args)
    bundle = open_bundle(args.bundle)
    (fit, calibration, unseen, trained), name = _images(args, bundle)
    if args.into is None:
        made = calibrate_bundle(
            args.bundle, args.out, fit(), calibration(), name, say, features, unseen(), trained()
        )
        target = args.out
    else:
        target = args.into
        if open_bundle(target).model_id != bundle.model_id:
            raise CalibrationError(
                f"--into must be a bundle of the model {bundle.model_id}, got "
                f"{open_bundle(target).model_id}"
            )
        made = calibrate_into(
            target, args.name, fit(), calibration(), name, say, unseen(), trained()
        )
    assert made.exact is not None
    _tell(made)
    _tell_caught(open_bundle(target), made.exact)
    if args.into is None:
        say(f"wrote {target}; serve it: ade serve {target}")
    else:
        say(f"added calibration {made.name}, version {made.version}, to {target}")


def _features(args: argparse.Namespace) -> FeatureSource | None:
    if args.features is None:
        if args.features_output or args.features_preprocess:
            raise FeaturesError("--features-output and --features-preprocess go with --features")
        return None
    if args.into is not None:
        raise FeaturesError(
            "--features goes with OUT, a new bundle: --into uses the features of its bundle"
        )
    return FeatureSource(args.features, args.features_output, args.features_preprocess)


def _images(args: argparse.Namespace, bundle: Bundle) -> tuple[list[Images], str]:
    """Images to fit to, to calibrate on, unseen ones and training images; the data's name.

    Training images are given for a folder alone: published data sets have hardly any copies.
    """
    if args.data in NAMES or not Path(args.data).is_dir():
        dataset = dataset_of(args, None, bundle.image_shape[0])
        trained_on = was_trained_on(bundle, dataset.name, dataset.splits)
        return [*_rows(dataset, trained_on), lambda: iter(())], dataset.name
    if args.root is not None:
        raise DataError(
            f"--root goes with a named data set ({', '.join(NAMES)}); {args.data!r} is a folder"
        )
    folder = Path(args.data)
    files, name = image_files(folder), folder.resolve().name
    trained_on = was_trained_on(bundle, name)
    parts: dict[str, list[Path]] = {part: [] for part in PARTS}
    for path in files:
        parts[part_in(folder, path, trained_on)].append(path)
    if trained_on:
        say(
            f"the model was trained on {name}: only its parts select and calibrate are used, and "
            "no copies of training images"
        )
    elif parts["test"]:
        say(f"{len(parts['test'])} of {len(files)} files are left out, for ade ood-bench")
    chosen = _chosen({part: shuffled(paths) for part, paths in parts.items()}, trained_on)
    used = [partial(readable, paths[:MAX_IMAGES]) for paths in chosen]
    return [*used, partial(readable, parts["train"] if trained_on else [])], name


def _rows(dataset: Dataset, trained_on: bool) -> list[Images]:
    """Images of a data set to fit to, to calibrate on, and unseen ones."""
    parts = {part: [(part, row) for row in range(len(dataset.parts[part]))] for part in PARTS}

    def read(rows: list[tuple[str, int]]) -> Iterator[bytes | np.ndarray]:
        return (np.asarray(dataset.parts[part].images[[row]])[0] for part, row in rows)

    return [partial(read, rows) for rows in _chosen(parts, trained_on)]


def _chosen(parts: dict[str, list[Any]], trained_on: bool) -> list[list[Any]]:
    """Items to fit to, to calibrate on, and unseen ones.

    If the model was trained on the data, the first two are its parts ``select`` and ``calibrate``.
    Otherwise all but the part ``test`` are divided between them. ``ade ood-bench`` measures false
    alarms on the part ``test``, so it is not used in either case.
    """
    if trained_on:
        return [parts[part] for part in HELD_OUT]
    rest = [item for part in PARTS if part != "test" for item in parts[part]]
    return [*_split(shuffled(rest)[:MAX_IMAGES]), parts["test"]]


def _split(items: list[Any]) -> list[list[Any]]:
    first = round(FIT_SHARE * len(items))
    return [items[:first], items[first:]]


def _tell(calibrations: Calibrations) -> None:
    """Print the false-alarm rates that users may expect."""
    assert calibrations.exact is not None and calibrations.resized is not None
    both = calibrations.exact is calibrations.resized
    _tell_of(calibrations.exact, "images" if both else "images of the model's size")
    if not both:
        _tell_of(calibrations.resized, "resized images")


def _tell_of(calibration: Calibration, what: str) -> None:
    count = len(calibration.scores)
    say(
        f"false alarms: the share of {what} like these that will be rejected (95 % band with "
        f"{count} calibration images)"
    )
    for alpha in ALPHAS:
        low, high = false_alarm_band(count, alpha)
        band = f"{100 * low:.1f} to {100 * high:.1f} %"
        needs = f"no verdict; it takes at least {images_needed(alpha)} calibration images"
        say(f"  alpha {alpha}: {band if high else needs}")


def _tell_caught(bundle: Bundle, calibration: Calibration) -> None:
    """Print the share of corrupted images that the new gate rejects, and the next step."""
    count = max(map(len, calibration.corrupted.values()), default=0)
    say(f"detection: the share of {count} of these images that is rejected once corrupted")
    at_first = {}
    for name in calibration.corrupted:
        shares = [calibration.caught(alpha).get(name) for alpha in ALPHAS[1:]]
        at_first[name] = shares[0]
        cells = [f"{percent(s)} at alpha {a}" for a, s in zip(ALPHAS[1:], shares, strict=True)]
        say(f"  {name}: {', '.join(cells)}")
    for line in advice(len(calibration.scores), bundle.has(FEATURES_NAME), at_first):
        say(f"next step: {line}")
