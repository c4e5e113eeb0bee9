"""``ade encoder OUT --data …``."""

from __future__ import annotations

import argparse
import math
import os

import numpy as np

from ade_cli.data_options import add_data_arguments, add_image_size, dataset_of, say
from ade_cli.image_files import FileError, check_parent
from ade_cli.paths import given_path
from ade_cli.run_checks import check_own_size
from export.to_onnx import export_encoder
from training.data import DataError, ImageSet
from training.datasets.sketch import record_of
from training.device import DEVICES, choose_device
from training.encoder import make_encoder
from training.encoder_network import check_size
from training.labels import class_folders, class_labels, listed, why_no_classes
from training.small_encoder import train_small_encoder

MINUTES = 15.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "out",
        type=given_path,
        metavar="OUT",
        help="an ONNX file for ade calibrate --features",
    )
    add_data_arguments(parser, required=True)
    add_image_size(parser)
    parser.add_argument(
        "--without-labels",
        action="store_true",
        help="ignore class folders, so that the same images can calibrate",
    )
    parser.add_argument(
        "--small",
        action="store_true",
        help="train a small network on images with classes: each score costs less with it",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        metavar="M",
        help=f"minutes of training, with --small (default: {MINUTES:g})",
    )
    parser.add_argument(
        "--device",
        choices=DEVICES,
        help="with --small: device to train on; auto, the default, takes a GPU if there is one",
    )


def run(args: argparse.Namespace) -> None:
    minutes = MINUTES if args.minutes is None else args.minutes
    if not 0 < minutes < math.inf:
        raise DataError(f"--minutes must be above 0 and finite, got {minutes:g}")
    if args.minutes is not None and not args.small:
        raise DataError("--minutes goes with --small: the other encoder needs no training time")
    if args.device is not None and not args.small:
        raise DataError("--device goes with --small: the other encoder runs on the CPU")
    if args.small and args.without_labels:
        raise DataError("--small needs the classes of the images, so not --without-labels")
    check_parent(args.out)
    if os.path.lexists(args.out):
        raise FileError(f"{args.out} exists: take another name")
    device = choose_device(args.device or "auto")

    def fits(side: int) -> None:
        check_own_size(args, side)
        check_size(side)

    dataset = dataset_of(args, None, args.image_size, fits=fits)
    labels = None if args.without_labels else class_labels(dataset)
    folders = class_folders(dataset.files.get("train", []))
    if labels is not None and folders is not None:
        say(f"classes: {listed(folders)}")
    reason = why_no_classes(dataset.files.get("train", []))
    if reason is not None and not args.without_labels:
        say(f"no classes: {reason}")
    images = ImageSet(dataset.parts["train"].images, labels)
    # Before the training, during which files may be lost. `ade calibrate` keeps images whose
    # classes were learnt out of the calibration.
    record = record_of(dataset) if labels is not None else None
    if args.small:
        made = train_small_encoder(images, minutes, device, report=say)
        times = made.images_seen / len(images)
        about = f"trained on {len(images)} images, each seen {times:.1f} times on average"
    else:
        made = make_encoder(images)
        about = "EfficientNet-Lite0, trained on ImageNet"
    example = np.asarray(images.images[:2])
    export_encoder(made.network, example, made.outputs, args.out, record if made.classes else None)
    say(f"wrote {args.out}: {about}, {made.classes or 'no'} classes")
