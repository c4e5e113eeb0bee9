"""``ade calibrate BUNDLE OUT --data … [--name NAME]``."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ade_base.files import read_file
from ade_base.pictures.ignored import Ignored
from ade_base.pictures.read import MAX_FILE_BYTES
from ade_base.pictures.view import LARGE
from ade_cli.advice import advice
from ade_cli.commands import command
from ade_cli.data_options import add_data_arguments, dataset_of, say
from ade_cli.help_texts import BUNDLE
from ade_cli.image_files import check_writable
from ade_cli.paths import given_bundle, given_path, say_what_is_not_followed
from ade_client.contract import DEFAULT
from export.feature_source import FORMAT, SCALES, FeaturesError, FeatureSource
from export.gate.calibrate import calibrate_bundle, check_out
from export.gate.examples import COUNT
from export.gate.images import readable
from export.gate.known_bad import MAX_KNOWN_BAD, check_enough
from export.gate.split import choose_files, choose_rows
from export.sketch import data_of_features
from serving.engine.bundle import Bundle, calibration_file, verify_bundle
from serving.ingest.picture import Picture
from serving.verdict.calibration import Calibration
from serving.verdict.calibration_file import CalibrationPair
from serving.verdict.decision import images_needed
from training.data import DataError
from training.datasets import NAMES
from training.datasets.files import shuffled
from training.datasets.folder import image_files

OWN = "bundle"  # of --features
MAX_DETAIL = 4
ALPHAS = (0.1, 0.05, 0.01)
HALF = 0.5  # share of damaged images below which a gate does not see the damage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Calibrate a bundle's gate on your images: afterwards it accepts images like them. No "
        "network is trained. Two fifths of the images fit the density of statistics, the others "
        "set the false-alarm rate; 1,000 or more are advisable. About 8 of 100 files of a folder, "
        "and the part test of a named data set, are left out for ade ood-bench. Images whose size "
        "differs from the model's are resized. The result is a new bundle: OUT. Prints the "
        "false-alarm rates to expect and the share of corrupted images that is rejected."
    )
    parser.add_argument("bundle", type=given_bundle, metavar="BUNDLE", help=BUNDLE)
    parser.add_argument(
        "out", type=given_path, metavar="OUT", help="folder of the new bundle; must not exist"
    )
    parser.add_argument(
        "--name",
        default=DEFAULT,
        metavar="NAME",
        help='add a calibration that requests select with "calibration": "NAME"; one of this name '
        "is replaced (default: replace the bundle's own, which judges requests that name none)",
    )
    add_data_arguments(parser, required=True)
    parser.add_argument(
        "--known-bad",
        type=given_path,
        metavar="DIR",
        help="pictures that the gate should reject, at least 10. It learns what tells them from "
        "good ones, for which a third of those that would calibrate is used, and uses it if "
        "cross-validation finds that better; alpha holds in any case (default: learn nothing)",
    )
    parser.add_argument(
        "--ignore",
        type=given_path,
        metavar="MASK.png",
        help="white pixels of this picture are ignored in every picture, also in use: nothing "
        "looks at them. All pictures must have its width and height (default: ignore nothing)",
    )
    parser.add_argument(
        "--detail",
        type=int,
        choices=range(1, MAX_DETAIL + 1),
        default=1,
        metavar="N",
        help="look at pictures larger than the model N times as finely in each direction, for "
        f"small damage in large pictures: at {LARGE} × N pixels. A score takes N² times as long, "
        f"also in use (1 to {MAX_DETAIL}; default: 1)",
    )
    parser.add_argument(
        "--keep-examples",
        action="store_true",
        help=f"keep {COUNT} of the images, small, in the new bundle: its page shows them as "
        "examples to everybody who can open it (default: keep none)",
    )
    parser.add_argument(
        "--features",
        type=given_path,
        metavar="MODEL.onnx",
        help="a network whose features tell things apart, such as your classifier, not trained on "
        "any of the images. Its features give the score another coordinate, its classes (if any) "
        f"a second one. It becomes part of the bundle. {OWN}: the networks that the bundle has "
        "(default: for images larger than the model, an encoder that sees the whole originals; "
        "otherwise the networks that the bundle has)",
    )
    parser.add_argument(
        "--features-output",
        metavar="NAME",
        help="the value of that graph that holds the features (default: the input of its last "
        "linear layer)",
    )
    parser.add_argument(
        "--features-preprocess",
        metavar="HOW",
        help=f"{FORMAT}: what the graph does not specify; SCALE, which only a float input needs, "
        f"is one of {', '.join(SCALES)}, or mean and standard deviation of values between 0 and 1, "
        "such as '0.5 0.5 0.5/0.25 0.25 0.25'",
    )


def run(args: argparse.Namespace) -> None:
    features = _features(args)
    # Before the images are read, which may take long.
    calibration_file(args.name)
    check_out(args.out)
    check_writable(args.out)
    bundle = verify_bundle(args.bundle)
    bundle.check_has("score")
    if features is not None:
        from export.features import check_source  # needs onnx, as in _data_of

        check_source(features, bundle.image_shape)
    known_bad = _known_bad(args.known_bad)
    ignored = None if args.ignore is None else Ignored.read(read_file(args.ignore, MAX_FILE_BYTES))
    if ignored is not None:
        say(f"{100 * ignored.share:.3g} % of each picture are ignored")
    (fit, calibration, unseen, trained), name = _images(args, bundle, _data_of(features, bundle))
    made = calibrate_bundle(
        args.bundle,
        args.out,
        fit,
        calibration,
        name,
        say,
        features,
        unseen,
        trained,
        args.keep_examples,
        args.name,
        sees_originals=False if args.features == Path(OWN) else None,
        known_bad=readable(known_bad, say),
        ignored=ignored,
        detail=args.detail,
    )
    assert made.exact is not None
    _tell(made)
    _tell_caught(made.exact)
    say(f"wrote {args.out}; serve it: {command('serve', args.out)}")


def _known_bad(folder: Path | None) -> list[Path]:
    """The files of known bad pictures, not too many; empty if none are given."""
    if folder is None:
        return []
    say_what_is_not_followed(folder)
    files = image_files(folder)
    check_enough(len(files))
    return list(shuffled(files)[:MAX_KNOWN_BAD])


def _features(args: argparse.Namespace) -> FeatureSource | None:
    if args.features in (None, Path(OWN)):
        if args.features_output or args.features_preprocess:
            raise FeaturesError("--features-output and --features-preprocess go with --features")
        return None
    return FeatureSource(args.features, args.features_output, args.features_preprocess)


def _data_of(features: FeatureSource | None, bundle: Bundle) -> Mapping[str, Any] | None:
    """The data set of the given network of features, or of the bundle's; ``None`` if unknown."""
    if features is None:
        return data_of_features(bundle)
    from export.features import data_of  # needs onnx, which calibration alone does not

    return data_of(features.path)


def _images(
    args: argparse.Namespace, bundle: Bundle, features: Mapping[str, Any] | None
) -> tuple[list[Iterator[bytes | np.ndarray | Picture]], str]:
    """Images to fit to, to calibrate on, unseen ones and training images; the data's name."""
    if args.data in NAMES or not Path(args.data).is_dir():
        dataset = dataset_of(args, None, bundle.image_shape[0])
        return [*choose_rows(dataset, bundle, features, say)], dataset.name
    if args.root is not None:
        raise DataError(
            f"--root goes with a named data set ({', '.join(NAMES)}); {args.data!r} is a folder"
        )
    folder = Path(args.data)
    say_what_is_not_followed(folder)
    chosen = choose_files(folder, bundle, features, say)
    return [readable(paths, say) for paths in chosen], folder.resolve().name


def _tell(calibrations: CalibrationPair) -> None:
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
        low, high = calibration.false_alarm_band(alpha)
        band = f"{100 * low:.1f} to {100 * high:.1f} %"
        needs = f"no verdict; it takes at least {images_needed(alpha)} calibration images"
        say(f"  alpha {alpha}: {band if high else needs}")


def _tell_caught(calibration: Calibration) -> None:
    """Print the share of corrupted images that the new gate rejects, and the next step."""
    count = max(map(len, calibration.corrupted.values()), default=0)
    say(f"detection: the share of {count} of these images that is rejected once corrupted")
    at_first, missed = {}, []
    for name in calibration.corrupted:
        shares = [calibration.caught(alpha).get(name) for alpha in ALPHAS[1:]]
        at_first[name] = shares[0]
        missed += [name] if shares[-1] is not None and shares[-1] < HALF else []
        cells = [f"{_percent(s)} at alpha {a}" for a, s in zip(ALPHAS[1:], shares, strict=True)]
        say(f"  {name}: {', '.join(cells)}")
    if missed:
        say(
            f"not seen: at alpha {ALPHAS[-1]}, fewer than half of the images with these are "
            f"rejected: {'; '.join(missed)}"
        )
    for line in advice(len(calibration.scores), calibration.sees_content, at_first):
        say(f"next step: {line}")


def _percent(share: float | None) -> str:
    """The share of images that is rejected; ``None`` is no verdict."""
    return "no verdict" if share is None else f"{100 * share:.0f} %"
