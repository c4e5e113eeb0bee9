"""``ade encoder OUT --data …``."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

import numpy as np

from ade_cli.data_options import add_data_arguments, dataset_of, say
from ade_cli.help_texts import DEVICE
from ade_cli.image_files import FileError, check_parent
from export.sketch import record_of
from export.to_onnx import export_encoder
from training.data import DataError, ImageSet
from training.device import DEVICES, choose_device
from training.encoder import class_folders, class_labels, listed, train_encoder
from training.encoder_network import check_size
from training.metrics.features import FeatureError
from training.runs import RunError

MINUTES = 15.0
NOT_TRAINED = "--minutes is for images with classes: without them nothing is trained"
ERRORS = (DataError, FeatureError, FileError, RunError)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "out",
        type=Path,
        metavar="OUT",
        help="an ONNX file for ade calibrate --features and ade train --guide",
    )
    add_data_arguments(parser, required=True)
    parser.add_argument(
        "--image-size", type=int, metavar="N", help="pixels per side (default: the data's)"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        metavar="M",
        help=f"minutes of training, if the images have classes (default: {MINUTES:g})",
    )
    parser.add_argument(
        "--without-labels",
        action="store_true",
        help="ignore the classes of the images, and train nothing: the encoder is a network that "
        "was trained on ImageNet, as for images without classes",
    )
    parser.add_argument("--device", choices=DEVICES, default="auto", help=DEVICE)


def run(args: argparse.Namespace) -> None:
    minutes = MINUTES if args.minutes is None else args.minutes
    if not 0 < minutes < math.inf:
        raise DataError(f"--minutes must be above 0 and finite, got {minutes:g}")
    if args.without_labels and args.minutes is not None:
        raise DataError(NOT_TRAINED)
    check_parent(args.out)
    if os.path.lexists(args.out):
        raise FileError(f"{args.out} exists: take another name")
    device = choose_device(args.device)
    dataset = dataset_of(args, None, args.image_size, fits=check_size)
    labels = None if args.without_labels else class_labels(dataset)
    folders = class_folders(dataset.files.get("train", []))
    if labels is not None and folders is not None:
        say(f"classes: {listed(folders)}")
    if labels is None and args.minutes is not None:
        raise DataError(NOT_TRAINED)
    images = ImageSet(dataset.parts["train"].images, labels)
    trained = train_encoder(images, minutes, device, report=say)
    example = np.asarray(images.images[:2])
    # `ade calibrate` keeps the network's training images out of the calibration.
    record = record_of(dataset) if trained.classes else None
    export_encoder(trained.network, example, trained.outputs, args.out, record)
    about = (
        f"trained on {trained.images_seen} images, {trained.classes} classes"
        if trained.classes
        else "EfficientNet-Lite0, trained on ImageNet"
    )
    say(f"wrote {args.out}: {about}")
