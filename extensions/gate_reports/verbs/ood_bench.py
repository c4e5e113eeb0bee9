"""``ade ood-bench BUNDLE --id … --ood … --out OUT``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ade_cli.data_options import check_outside, say
from ade_cli.help_texts import BUNDLE
from ade_cli.image_files import FileError, check_folder, load_engine
from ade_cli.image_sets import GivenImages, name_of
from ade_cli.paths import given, given_bundle, given_path
from export.gate.corruptions import CORRUPTIONS
from export.gate.images import Images, readable
from export.gate.split import as_read, files_that_test
from extensions.gate_reports.ood_bench import bench
from serving.engine.bundle import Bundle
from serving.verdict.calibration import CalibrationError
from training.data import DataError
from training.datasets import NAMES, load_dataset


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=given_bundle, metavar="BUNDLE", help=BUNDLE)
    parser.add_argument(
        "--id",
        required=True,
        type=given,
        dest="in_distribution",
        metavar="IMAGES",
        help="in-distribution (ID) images that were not used for training or calibration: "
        f"{', '.join(NAMES)} (the test part, with --root), a folder of images (its part test, if "
        "it trained a network of the bundle or calibrated the gate), or an .npy or .npz file; "
        "images that calibrated the gate or trained a network are left out, and so are copies",
    )
    parser.add_argument("--root", metavar="DIR", help="folder of a named data set")
    parser.add_argument(
        "--ood",
        action="extend",
        nargs="*",
        default=[],
        type=given_path,
        metavar="IMAGES",
        help="sets of OOD images: folders, .npy or .npz files; corrupted images are always added: "
        f"{', '.join(CORRUPTIONS)}",
    )
    parser.add_argument(
        "--out", required=True, type=given_path, metavar="OUT", help="folder of the report"
    )
    parser.add_argument("--images", type=int, metavar="N", help="use only N of each set")
    parser.add_argument(
        "--corrupted",
        type=int,
        default=1000,
        metavar="N",
        help="number of in-distribution images that are corrupted (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> None:
    for name in ("images", "corrupted"):
        if getattr(args, name) is not None and getattr(args, name) < 2:
            raise DataError(f"--{name} must be at least 2, got {getattr(args, name)}")
    if args.root is not None and args.in_distribution not in NAMES:
        raise DataError(
            f"--root goes with a named data set ({', '.join(NAMES)}), got --id "
            f"{args.in_distribution!r}"
        )
    check_outside(args.out, args.in_distribution)
    for path in args.ood:
        check_outside(args.out, str(path.resolve()))  # a folder, whatever its name
    _check_out(args.out)
    engine = load_engine(args.bundle, "score", device="cpu")
    bundle = engine.bundle
    calibrations = engine.calibrations
    if calibrations.exact is None:
        raise CalibrationError(f"{args.bundle} is not calibrated: ade calibrate does that")
    names = [name_of(path) for path in args.ood]
    if len({*names, *CORRUPTIONS}) < len(names) + len(CORRUPTIONS):
        raise DataError(
            f"sets of OOD images need different names, got {', '.join((*names, *CORRUPTIONS))}"
        )
    own = bundle.manifest.get("calibration") or {}
    sets = {name_of(path): GivenImages(path, args.images) for path in args.ood}
    id_name, id_images, trained = _id_images(args, bundle, own.get("data"))
    made = bench(engine, id_name, id_images, sets, args.corrupted, args.out, say, trained)
    say(f"{made}")


def _check_out(out: Path) -> None:
    """Check before the images are scored where the report is to be written.

    Raises:
        FileError: no report can be written there, or it would replace another program's.
    """
    check_folder(out)
    found = [name for name in ("report.md", "report.html") if os.path.lexists(out / name)]
    if found and not (out / "figures.csv").is_file():
        raise FileError(
            f"{out} holds {' and '.join(found)}, but no figures.csv of an earlier ade ood-bench: "
            "choose another --out"
        )


def _id_images(
    args: argparse.Namespace, bundle: Bundle, calibrated_on: str | None
) -> tuple[str, Images, Images]:
    if args.in_distribution in NAMES:
        dataset = load_dataset(args.in_distribution, args.root, bundle.image_shape[0], report=say)
        rows = range(len(dataset.parts["test"]))[: args.images]
        return dataset.splits["test"], [as_read(dataset, "test", row) for row in rows], ()
    path = Path(args.in_distribution)
    chosen = files_that_test(path, bundle, calibrated_on, say) if path.is_dir() else None
    if chosen is None:
        return Path(os.path.abspath(path)).name, GivenImages(path, args.images), ()
    is_test, trained = chosen
    name = f"{path.resolve().name}, part test"
    return name, GivenImages(path, args.images, is_test), readable(trained, say)
