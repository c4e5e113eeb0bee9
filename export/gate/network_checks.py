"""Checks that a features' network suits the images that calibrate, and has not seen them."""

from __future__ import annotations

import math
from itertools import islice

import numpy as np
from scipy import stats

from ade_base.pictures.view import Look
from export.gate.density_fit import MIN_IMAGES
from export.gate.images import Images, prepared
from export.gate.pair import Parts
from serving.engine.engine import InferenceEngine
from serving.ingest.picture import Picture
from serving.verdict.calibration import Calibration
from serving.verdict.semantic import ENERGY, semantic_statistics
from training.data import Report

MAX_UNSEEN, TAIL, SEEN_P_VALUE = 1000, 0.05, 1e-4
# Mean energy of images, in standard deviations of the bundle's own calibration, from which on their
# kinds are unknown to the network. Of a part of its classes it is 0.1, of other photographs 1.5.
UNKNOWN_ENERGY, TRIED = 1.0, 500


def knows_classes(
    own: Calibration | None, engine: InferenceEngine, parts: Parts, report: Report
) -> bool:
    """Whether the features' network is about as sure of the images as of those it was meant for.

    Args:
        own: a calibration with that network for images that it was meant for; without one, nothing
            can be said against the network.
        engine: of the bundle.
        parts: the images.
        report: called with what the user should know.
    """
    if own is None or own.known is None:
        return True
    if ENERGY not in own.names:  # it has no classes, or does not know those of its own images
        return False
    found = engine.features(np.stack([image.pixels for image in parts[0][:TRIED]]))
    energy = own.known.coordinates(semantic_statistics(found))[ENERGY].mean()
    if energy <= UNKNOWN_ENERGY:
        return True
    report(
        "note: features.onnx does not know what these images show: on average it is "
        f"{energy:.1f} standard deviations less sure of its classes than in the bundle's own "
        "calibration. So its classes are left out, and its features alone are used. An encoder of "
        "ade encoder, or your classifier, may see more"
    )
    return False


def warn_if_seen(
    engine: InferenceEngine,
    calibration: Calibration,
    unseen: Images,
    report: Report,
) -> None:
    """Warn if the features' network was probably trained on the calibration images.

    A network is surer of images that it was trained on. If it knows the calibration images, too few
    of them lie in the tail, where decisions are made, compared with unseen images.

    Args:
        engine: of the bundle.
        calibration: the new one.
        unseen: images of the same kind on which the network was not trained, at most
            :data:`MAX_UNSEEN` of which are used.
        report: called with a note, and with the warning.
    """
    if calibration.known is None or not calibration.sees_content:
        return
    report(
        "note: features.onnx, the network that sees what images show, must not have been trained "
        "on any of these images; otherwise more than a share of alpha will be rejected"
    )
    resize, look = calibration.resize == "fit", Look(0, calibration.ignored)
    few = islice(unseen, MAX_UNSEEN)
    others = [
        image.pixels
        for _, image in prepared(few, engine.image_shape, resize, lambda resized: look)
        if isinstance(image, Picture)
    ]
    count = len(calibration.scores)
    tail = math.floor(TAIL * (count + 1))
    if len(others) < MIN_IMAGES or not tail:
        return
    found = semantic_statistics(engine.features(np.stack(others)))
    values = calibration.known.coordinates(found)
    for name in filter(values.__contains__, calibration.names):  # in the same order every time
        reference = calibration.reference[:, calibration.names.index(name)]
        beyond = int((values[name] > reference[-tail]).sum())
        p_value = stats.betabinom.sf(beyond - 1, len(others), tail, count + 1 - tail)
        if p_value < SEEN_P_VALUE:
            report(
                f"WARNING: the network has probably seen the calibration images: in {name}, "
                f"{100 * beyond / len(others):.1f} % of {len(others)} other images are more "
                f"unusual than {100 * (1 - tail / (count + 1)):.0f} % of them. More images than "
                "alpha allows will be rejected. Calibrate on images that the network has not seen"
            )
