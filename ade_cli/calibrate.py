"""``ade calibrate BUNDLE --data …``."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from ade_cli.data_options import add_data_arguments, dataset_of, say
from export.calibrate import calibrate_bundle
from serving.bundle import BundleError, open_bundle
from serving.ood import CalibrationError
from training.data import PARTS, DataError, Dataset

ERRORS = (BundleError, CalibrationError, DataError)

DEFAULT_ALPHA = 0.01  # of a score request
MAX_IMAGES = 20_000  # half of them to calibrate: p-values from 1e-4 on


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    add_data_arguments(parser, required=True)


def run(args: argparse.Namespace) -> None:
    bundle = open_bundle(args.bundle)
    dataset = dataset_of(args, None, bundle.image_shape[0])
    fit, calibration = _held_out(dataset, trained_on=str(bundle.manifest["data"].get("name")))
    result = calibrate_bundle(args.bundle, fit, calibration, dataset.name, report=say)
    smallest = 1 / (len(result.bpd) + 1)
    say(f"calibrated on {len(result.bpd)} images: p-values from {smallest:.2g} on")
    if smallest > DEFAULT_ALPHA:
        say(f"warning: at alpha {DEFAULT_ALPHA} nothing can be flagged with so few; that takes "
            f"{round(1 / DEFAULT_ALPHA) - 1} calibration images at least")


def _held_out(dataset: Dataset, trained_on: str) -> tuple[np.ndarray, np.ndarray]:
    """Images to fit and to calibrate on: of the training data its two held-out parts, of any other all."""
    if dataset.name == trained_on:
        return np.asarray(dataset.parts["select"].images[:]), np.asarray(dataset.parts["calibrate"].images[:])
    rows = [(part, row) for part in PARTS for row in range(len(dataset.parts[part]))]
    order = np.random.Generator(np.random.Philox(key=0)).permutation(len(rows))[:MAX_IMAGES]
    images = np.empty((len(order), dataset.image_size, dataset.image_size, dataset.channels), np.uint8)
    for i, chosen in enumerate(order):
        part, row = rows[chosen]
        images[i] = np.asarray(dataset.parts[part].images[[row]])[0]
    return images[::2], images[1::2]
