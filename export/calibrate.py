"""Calibration of a bundle: held-out images through the serving engine, their scores into the bundle."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from serving.bundle import CALIBRATION_NAME, verify_bundle, write_manifest
from serving.engine import InferenceEngine, NotFinite, Score
from serving.ood import Calibration, CalibrationError

CHUNK = 256


def calibrate_bundle(folder: Path, fit_images: np.ndarray, calibration_images: np.ndarray, data_name: str,
                     report: Callable[[str], None] = lambda line: None) -> Calibration:
    """Score images as requests are scored, and store the result in the bundle.

    Args:
        folder: of the bundle; it gets another ``calibration.npz`` and manifest.
        fit_images: uint8 ``(M, H, W, C)``; the statistic is fitted to them. Never trained on.
        calibration_images: uint8 ``(N, H, W, C)``; others, never trained on.
        data_name: what they are, for the manifest.
        report: is told of progress, a line at a time.

    Raises:
        BundleError: the bundle is not whole.
        CalibrationError: too few images, or scores that cannot be used.
    """
    bundle = verify_bundle(folder)
    if "score" not in bundle.operations:
        raise CalibrationError(f"{bundle.name} cannot score: it was trained without an inference network")
    engine = InferenceEngine(bundle, device="cpu", operations=["score"])
    bits = []
    for name, images in (("fitting", fit_images), ("calibration", calibration_images)):
        if len(images) and images.shape[1:] != engine.image_shape:
            raise CalibrationError(f"{name} images must be {engine.image_shape}, got {images.shape[1:]}")
        values: list[float] = []
        for first in range(0, len(images), CHUNK):
            values += [_bpd(score) for score in engine.score(images[first:first + CHUNK])]
            report(f"{name}: scored {len(values)} of {len(images)} images")
        bits.append(np.array(values))
    calibration = Calibration.fit(bits[0], bits[1])
    temporary = folder / f".{CALIBRATION_NAME}.tmp"
    temporary.write_bytes(calibration.to_bytes())
    os.replace(temporary, folder / CALIBRATION_NAME)
    write_manifest(folder, {**bundle.manifest, "calibration": {**calibration.summary(), "data": data_name}})
    return calibration


def _bpd(score: Score | NotFinite) -> float:
    return score.bpd if isinstance(score, Score) else float("nan")
