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
        "--minutes", type=float, default=15.0, help="minutes of training (default: %(default)g)"
    )
    parser.add_argument(
        "--without-labels", action="store_true", help="do not use the classes of the images"
    )
    parser.add_argument("--device", choices=DEVICES, default="auto", help=DEVICE)


def run(args: argparse.Namespace) -> None:
    if not 0 < args.minutes < math.inf:
        raise DataError(f"--minutes must be above 0 and finite, got {args.minutes:g}")
    check_parent(args.out)
    if os.path.lexists(args.out):
        raise FileError(f"{args.out} exists: take another name")
    device = choose_device(args.device)
    dataset = dataset_of(args, None, args.image_size, fits=check_size)
    labels = None if args.without_labels else class_labels(dataset)
    folders = class_folders(dataset.files.get("train", []))
    if labels is not None and folders is not None:
        say(f"classes: {listed(folders)}")
    images = ImageSet(dataset.parts["train"].images, labels)
    trained = train_encoder(images, args.minutes, device, report=say)
    example = np.asarray(images.images[:2])
    # `ade calibrate` keeps the network's training images out of the calibration.
    export_encoder(trained.network, example, trained.outputs, args.out, record_of(dataset))
    kind = f"{trained.classes} classes" if trained.classes else "no labels"
    say(f"wrote {args.out}: {trained.images_seen} images seen, {kind}")
