"""``ade ood-bench BUNDLE --id … --ood … --out OUT``."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import numpy as np

from ade_cli.data_options import check_outside, part_in, say, was_trained_on
from ade_cli.image_files import load_engine
from ade_cli.image_sets import ImageSet
from export.verdict.calibrate import statistics_of
from export.verdict.corruptions import CORRUPTIONS
from export.verdict.ood_bench import write_report
from serving.api.requests import InputImage, prepare_image
from serving.engine.bundle import Bundle, BundleError
from serving.verdict.calibration import CalibrationError
from training.data import DataError
from training.datasets import NAMES, load_dataset

ERRORS = (BundleError, CalibrationError, DataError)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument(
        "--id",
        required=True,
        dest="in_distribution",
        metavar="IMAGES",
        help="in-distribution (ID) images that were not used for training or calibration: "
        f"{', '.join(NAMES)} (the test part, with --root), a folder of images (its part test, if "
        "it trained the model or calibrated the gate), or an .npy or .npz file",
    )
    parser.add_argument("--root", metavar="DIR", help="folder of a named data set")
    parser.add_argument(
        "--ood",
        nargs="*",
        default=[],
        type=Path,
        metavar="IMAGES",
        help="sets of OOD images: folders, .npy or .npz files; corrupted images are always added: "
        f"{', '.join(CORRUPTIONS)}",
    )
    parser.add_argument(
        "--out", required=True, type=Path, metavar="OUT", help="folder of the report"
    )
    parser.add_argument("--images", type=int, metavar="N", help="use only N of each set")
    parser.add_argument(
        "--corrupted",
        type=int,
        default=1000,
        metavar="N",
        help="number of in-distribution images that are corrupted (default: %(default)s)",
    )
    parser.add_argument("--resize", choices=("fit",), help="resize images of another size")


def run(args: argparse.Namespace) -> None:
    for name in ("images", "corrupted"):
        if getattr(args, name) is not None and getattr(args, name) < 2:
            raise DataError(f"--{name} must be at least 2, got {getattr(args, name)}")
    check_outside(args.out, args.in_distribution)
    for path in args.ood:
        check_outside(args.out, str(path.resolve()))  # a folder, whatever its name
    engine = load_engine(args.bundle, "score", device="cpu")
    bundle = engine.bundle
    calibrations = engine.store.usable()
    calibration = calibrations.of(args.resize == "fit")
    if calibration is None:
        raise CalibrationError(
            f"{args.bundle} is not calibrated"
            + (" for resized images" if calibrations.exact else "")
            + ": ade calibrate does that"
        )
    names = [path.stem for path in args.ood]
    if len({*names, *CORRUPTIONS}) < len(names) + len(CORRUPTIONS):
        raise DataError(
            f"sets of OOD images need different names, got {', '.join((*names, *CORRUPTIONS))}"
        )
    own = bundle.manifest.get("calibration") or {}
    id_name, id_images = _id_images(args, bundle, calibrations.data or own.get("data"))
    sets = {path.stem: ImageSet(path, args.images) for path in args.ood}
    args.out.mkdir(parents=True, exist_ok=True)
    id_statistics = statistics_of(engine, id_images, id_name, args.resize, say)
    ood_sets = {
        name: statistics_of(engine, images, name, args.resize, say) for name, images in sets.items()
    }
    prepared = (
        prepare_image(source, engine.image_shape, args.resize == "fit", 0) for source in id_images
    )
    pixels = np.stack(
        [
            image.pixels
            for image in islice(
                (image for image in prepared if isinstance(image, InputImage)), args.corrupted
            )
        ]
    )
    for name, corrupt in CORRUPTIONS.items():
        ood_sets[name] = statistics_of(
            engine, corrupt(pixels, np.random.default_rng(0)), name, report=say
        )
    say(f"{write_report(calibration, bundle.model_id, id_name, id_statistics, ood_sets, args.out)}")


def _id_images(
    args: argparse.Namespace, bundle: Bundle, calibrated_on: str | None
) -> tuple[str, Iterable[bytes | np.ndarray]]:
    if args.in_distribution in NAMES:
        dataset = load_dataset(args.in_distribution, args.root, bundle.image_shape[0], report=say)
        return dataset.splits["test"], np.asarray(dataset.parts["test"].images[: args.images])
    path = Path(args.in_distribution)
    name = path.resolve().name
    trained_on = path.is_dir() and was_trained_on(bundle, name)
    if not path.is_dir() or not (trained_on or name == calibrated_on):
        return path.name, ImageSet(path, args.images)
    how = "model was trained" if trained_on else "gate was calibrated"
    say(f"the {how} on {name}: only its part test is used")
    return f"{name}, part test", ImageSet(
        path, args.images, lambda file: part_in(path, file, trained_on) == "test"
    )
