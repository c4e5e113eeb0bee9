"""``ade ood-bench BUNDLE --id … --ood … --out OUT``."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from ade_cli.data_options import readable, say, was_trained_on
from export.verdict.calibrate import statistics_of
from export.verdict.corruptions import CORRUPTIONS
from export.verdict.ood_bench import write_report
from serving.api.requests import InputImage, prepare_image
from serving.engine.bundle import Bundle, BundleError, open_bundle
from serving.engine.engine import InferenceEngine
from serving.verdict.calibration import CalibrationError
from training.data import DataError
from training.datasets import NAMES, load_dataset
from training.datasets.files import part_of, shuffled
from training.datasets.folder import image_files

ERRORS = (BundleError, CalibrationError, DataError)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument(
        "--id",
        required=True,
        dest="usual",
        metavar="IMAGES",
        help=f"usual images that nothing has seen: {', '.join(NAMES)} (their test part, with --root), a "
        "folder of images, or an .npy or .npz file of them",
    )
    parser.add_argument("--root", metavar="DIR", help="where a named data set lies")
    parser.add_argument(
        "--ood",
        nargs="*",
        default=[],
        type=Path,
        metavar="IMAGES",
        help="sets of strangers: folders, .npy or .npz files; made ones are always added: "
        f"{', '.join(CORRUPTIONS)}",
    )
    parser.add_argument(
        "--out", required=True, type=Path, metavar="OUT", help="a folder for the report"
    )
    parser.add_argument("--images", type=int, metavar="N", help="only N of each set")
    parser.add_argument(
        "--corrupted",
        type=int,
        default=2000,
        metavar="N",
        help="usual images that the made strangers are made from (default: %(default)s)",
    )
    parser.add_argument(
        "--resize", choices=("fit",), help="bring images of other sizes to the model's"
    )


def run(args: argparse.Namespace) -> None:
    for name in ("images", "corrupted"):
        if getattr(args, name) is not None and getattr(args, name) < 2:
            raise DataError(f"--{name} must be at least 2, got {getattr(args, name)}")
    bundle = open_bundle(args.bundle)
    engine = InferenceEngine(bundle, device="cpu", operations=["score"])
    calibration = engine.calibrations.of(args.resize == "fit")
    if calibration is None:
        raise CalibrationError(
            f"{args.bundle} is not calibrated"
            + (" for resized images" if engine.calibration else "")
            + ": ade calibrate does that"
        )
    names = [path.stem for path in args.ood]
    if len({*names, *CORRUPTIONS}) < len(names) + len(CORRUPTIONS):
        raise DataError(
            f"sets of strangers need different names, got {', '.join((*names, *CORRUPTIONS))}"
        )
    usual_name, usual = _usual(args, bundle)
    sets = {path.stem: _Images(path, args.images) for path in args.ood}
    args.out.mkdir(parents=True, exist_ok=True)
    found = statistics_of(engine, usual, usual_name, args.resize, say)
    strangers = {
        name: statistics_of(engine, images, name, args.resize, say) for name, images in sets.items()
    }
    prepared = (
        prepare_image(source, engine.image_shape, args.resize == "fit", 0) for source in usual
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
        strangers[name] = statistics_of(
            engine, corrupt(pixels, np.random.default_rng(0)), name, report=say
        )
    say(f"{write_report(calibration, bundle.model_id, usual_name, found, strangers, args.out)}")


def _usual(args: argparse.Namespace, bundle: Bundle) -> tuple[str, Iterable[bytes | np.ndarray]]:
    if args.usual in NAMES:
        dataset = load_dataset(args.usual, args.root, bundle.image_shape[0], report=say)
        return dataset.splits["test"], np.asarray(dataset.parts["test"].images[: args.images])
    usual = Path(args.usual)
    name = usual.resolve().name
    if usual.is_dir() and was_trained_on(bundle, name):
        say(f"{name} is what the model was trained on: its part test is taken")
        return f"{name}, part test", _Images(usual, args.images, "test")
    return usual.name, _Images(usual, args.images)


class _Images:
    """Images of a folder or of an array's file, one after another, as often as they are asked for."""

    def __init__(self, path: Path, limit: int | None, part: str | None = None) -> None:
        if not path.exists():
            raise DataError(f"there is no {path}")
        self._path, self._limit, self._part = path, limit, part

    def __iter__(self) -> Iterator[bytes | np.ndarray]:
        if self._path.is_dir():
            files = [
                path for path in image_files(self._path) if self._part in (None, part_of(path.name))
            ]
            return readable(shuffled(files)[: self._limit])
        return iter(_array(self._path)[: self._limit])


def _array(path: Path) -> np.ndarray:
    """The images of an ``.npy``, or of an ``.npz`` that holds one such array."""
    try:
        with (
            np.load(path, allow_pickle=False) if path.suffix == ".npz" else nullcontext() as arrays
        ):
            found = [np.load(path, allow_pickle=False)] if arrays is None else list(arrays.values())
    except (ValueError, OSError, EOFError, BadZipFile) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    images = [array for array in found if array.dtype == np.uint8 and array.ndim == 4]
    if len(images) != 1:
        raise DataError(
            f"{path} must hold one array of images, uint8 (N, H, W, C), got "
            f"{', '.join(f'{a.dtype} {a.shape}' for a in found)}"
        )
    return images[0]
