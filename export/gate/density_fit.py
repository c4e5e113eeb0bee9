"""Fits the density of the statistics behind the verdict.

Of everything that calibrates, only this module needs scikit-learn.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

from ade_base.pictures.view import Look
from serving.verdict.calibration import ESTIMATOR, Calibration, CalibrationError
from serving.verdict.density import FARTHEST, Mixture, NormalScores
from serving.verdict.encoder import DISTANCES, OF_ENCODER, SEEN, EncoderMemory
from serving.verdict.semantic import FEATURES, OF_NETWORK, SEMANTIC_PREFIX, KnownImages
from serving.verdict.statistics import PIXEL_PREFIX, finite_rows

MIN_IMAGES = 20
IMAGES_A_COMPONENT = 250
MAX_COMPONENTS = 8
# Chosen on corrupted held-out images, as the statistics were: docs/ood/measurements.md.
SHRINKAGE = 0.5  # of each component's covariance towards that of all images
RIDGE = 0.02  # added to a variance of about one
# Weight of one unit of the mean semantic normal score, in standard deviations of the density's
# score. Chosen on held-out classes and corruptions: docs/explanation/trials.md#the-gate.
SEMANTIC_WEIGHT = 1.5
# The same of two networks' combined score: docs/explanation/trials.md#two-encoders.
BOTH_WEIGHT = 2.0
# Share of known images whose scores of the density count alike: less if the distance is in all
# directions, because then it sees less.
FLOOR, FLOOR_OUTSIDE_MAIN = 1 / 2, 3 / 4
# Both for pictures whose patches an encoder sees: the likelihood of their few pixels says little,
# so it counts only above the highest of the fitted pictures, each held out.
# Chosen on magnetic tiles: docs/explanation/trials.md#the-whole-picture.
PATCHES_WEIGHT, FLOOR_PATCHES = 6.0, 1.0
FOLDS, IMAGES_OF_FOLDS = 10, 2000  # to find the floor and the spread of the density's score


def fit_calibration(
    fit: Mapping[str, np.ndarray],
    calibrate: Mapping[str, np.ndarray],
    resize: str | None = None,
    encoder: EncoderMemory | None = None,
) -> Calibration:
    """Fit a density to the statistics of some images, and calibrate it on others.

    Args:
        fit: float32 ``(m,)`` by name, of images that are neither training images nor in the other
            set.
        calibrate: float32 ``(n,)`` by name.
        resize: ``fit`` if the images were resized so.
        encoder: what it knows of the fitted images; both sets hold what it measured.

    Raises:
        CalibrationError: too few images, or statistics that are not finite or all alike.
    """
    for name, purpose, share, values in (
        ("fitting", "fitting the density", "two fifths", fit),
        ("calibration", "setting the false-alarm rate", "three fifths", calibrate),
    ):
        count = len(values["bpd"])
        if count < MIN_IMAGES:
            raise CalibrationError(
                f"{purpose} needs at least {MIN_IMAGES} images, got {count} (ade calibrate takes "
                f"{share} of yours for that)"
            )
        bad = ~finite_rows(values)
        if bad.any():
            raise CalibrationError(
                f"{name}: the statistics of {int(bad.sum())} images are not finite"
            )
    known, fit, calibrate = _semantic(fit, calibrate)
    if encoder is not None:
        fit = {**fit, **encoder.coordinates(fit, known=True)}
        calibrate = {**calibrate, **encoder.coordinates(calibrate)}
    inputs = (*OF_NETWORK, *OF_ENCODER)
    names = tuple(
        sorted(
            (name for name, its in fit.items() if name not in inputs and its.min() < its.max()),
            key=lambda name: name.startswith(SEMANTIC_PREFIX),
        )
    )
    if "bpd" not in names:
        raise CalibrationError("the images' scores do not vary: a density cannot be fitted to them")
    rows = np.stack([fit[name] for name in names], axis=1)
    normal = NormalScores.fit(rows)
    scores = normal(rows)
    semantic = [name.startswith(SEMANTIC_PREFIX) for name in names]
    mixture = fit_mixture(scores[:, np.logical_not(semantic)])
    if any(semantic):
        sees_patches = encoder is not None and encoder.patches is not None
        outside = known is None or known.main.size
        alike = FLOOR_PATCHES if sees_patches else FLOOR_OUTSIDE_MAIN if outside else FLOOR
        low, floor, high = np.quantile(
            _held_out_scores(scores[:, np.logical_not(semantic)]), [0.16, alike, 0.84]
        )
        times = (PATCHES_WEIGHT if sees_patches else SEMANTIC_WEIGHT) / sum(semantic)
        if 0 < len({*names} & {*SEEN}) < sum(semantic):
            times = BOTH_WEIGHT
        weight = float(times * (high - low) / 2)
        if known is not None:
            known = replace(known, weight=weight, floor=float(floor))
        if encoder is not None:
            pooled = replace(encoder.pooled, weight=weight, floor=float(floor))
            encoder = replace(encoder, pooled=pooled).calibrated(calibrate.get(DISTANCES))
    pixels = [i for i, name in enumerate(names) if name.startswith(PIXEL_PREFIX)]
    reference = np.stack([calibrate[name] for name in names], axis=1)
    made = Calibration(
        ESTIMATOR,
        resize,
        names,
        normal,
        mixture,
        np.empty(0),
        np.sort(reference, axis=0),
        fit_mixture(scores[:, pixels]),
        known,
        encoder,
    )
    return replace(made, scores=np.sort(made.ood_scores(normal(reference))))


def fit_seen(
    fit: Mapping[str, np.ndarray], calibrate: Mapping[str, np.ndarray], look: Look
) -> Calibration:
    """:func:`fit_calibration` with an encoder, if it looked at the images so."""
    if not look.size:
        return fit_calibration(fit, calibrate)
    encoder, fit = EncoderMemory.of(fit, look)
    return fit_calibration(fit, encoder.measured(calibrate), encoder=encoder)


def _semantic(
    fit: Mapping[str, np.ndarray], calibrate: Mapping[str, np.ndarray]
) -> tuple[KnownImages | None, Mapping[str, np.ndarray], Mapping[str, np.ndarray]]:
    """Make the fitted images the known ones, and give the coordinates that are relative to them."""
    if FEATURES not in fit:
        return None, fit, calibrate
    known = KnownImages.of(fit)
    return (
        known,
        {**fit, **known.coordinates(fit, known=True)},
        {**calibrate, **known.coordinates(calibrate)},
    )


def _held_out_scores(scores: np.ndarray) -> np.ndarray:
    """Scores of (the first 2,000) images, ``(m, d)``, each by a density fitted without it.

    A density with few images gives those that it was fitted to far lower and more similar scores.
    """
    scores = scores[:IMAGES_OF_FOLDS]
    fold = np.arange(len(scores)) % FOLDS
    found = np.empty(len(scores))
    for number in range(FOLDS):
        fitted = fit_mixture(scores[fold != number])
        found[fold == number] = fitted.negative_log_density(scores[fold == number])
    return found


def fit_mixture(scores: np.ndarray) -> Mixture:
    """Gaussians found by expectation maximisation, their covariances shrunk towards the common one.

    Each component has few images for its many covariances. Shrinking keeps the shape that all
    components share.
    """
    scores = np.clip(scores, -FARTHEST, FARTHEST)
    count, dims = scores.shape
    components = max(1, min(MAX_COMPONENTS, count // IMAGES_A_COMPONENT))
    common = np.cov(scores.T).reshape(dims, dims) + RIDGE * np.eye(dims)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fifty rounds are enough for a start
        found = GaussianMixture(components, reg_covar=0.1, random_state=0, max_iter=50).fit(scores)
    shares = found.predict_proba(scores)
    whiteners, log_weights = [], []
    for k in range(components):
        gap = scores - found.means_[k]
        own = (gap * shares[:, k : k + 1]).T @ gap / shares[:, k].sum()
        root = np.linalg.cholesky((1 - SHRINKAGE) * own + SHRINKAGE * common)
        whiteners.append(np.linalg.inv(root))
        log_weights.append(
            math.log(found.weights_[k])
            - np.log(np.diagonal(root)).sum()
            - dims / 2 * math.log(2 * math.pi)
        )
    return Mixture(np.array(log_weights), found.means_, np.array(whiteners))
