"""Opens the calibrations of a bundle: its own, and those that have a name."""

from __future__ import annotations

import dataclasses
import logging

from ade_client.contract import DEFAULT
from serving.engine.bundle import ENCODER_NAME, FEATURES_NAME, Bundle, calibration_file
from serving.verdict.calibration_file import CalibrationPair
from serving.verdict.encoder import SEEN
from serving.verdict.semantic import DISTANCE, ENERGY
from serving.verdict.statistics import statistic_names

logger = logging.getLogger(__name__)


def open_calibrations(bundle: Bundle) -> dict[str, CalibrationPair]:
    """Read all calibrations of a bundle, by name.

    The bundle's own is called :data:`ade_client.contract.DEFAULT`. If there is none,
    it judges nothing. A calibration that another version of libwebp helped to make is used, with a
    warning in the log.

    Raises:
        BundleError: a file does not match the manifest.
        CalibrationError: one of the calibrations cannot be used.
    """
    names: list[str] = []
    if "score" in bundle.operations:
        names = statistic_names(bundle.image_shape, bundle.latent_shapes)
        if bundle.has(FEATURES_NAME):
            has_classes = (bundle.manifest.get("features") or {}).get("classes")
            names += [DISTANCE, ENERGY] if has_classes else [DISTANCE]
        if bundle.has(ENCODER_NAME):
            names += SEEN
    found = {DEFAULT: CalibrationPair()}
    for name in bundle.calibrations:
        read = CalibrationPair.load(bundle.file(calibration_file(name)), name)
        read.check(names)
        if name == DEFAULT:  # files of older versions leave the coder's version to the manifest
            about = bundle.manifest.get("calibration") or {}
            read = dataclasses.replace(read, webp=read.webp or about.get("webp", ""))
        warning = read.other_coder()
        if warning is not None:
            logger.warning("%s", warning)
        found[name] = read
    return found
