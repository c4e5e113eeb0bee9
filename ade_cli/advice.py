"""What would make a weak gate better, with what was measured of it.

The figures are from docs/ood.md and docs/ood/measurements.md.
"""

from __future__ import annotations

from collections.abc import Mapping

from export.gate.corruptions import CORRUPTIONS, SUBTLE

ENOUGH = 500  # calibration images: 1,000 files give about 550, fewer if some cannot be used
MIN_GROSS, MIN_SUBTLE = 0.9, 0.6  # shares that a good gate rejects


def advice(calibrated: int, has_features: bool, rejected: Mapping[str, float | None]) -> list[str]:
    """Sentences for the user, the most useful step first; empty for a gate without a weakness.

    Args:
        calibrated: number of calibration images.
        has_features: whether the features of a network count in the verdict.
        rejected: share of corrupted images that is rejected at alpha 0.05, by the names of
            :mod:`export.gate.corruptions`; ``None`` without a verdict. A kind is missing if no
            such image has a likelihood: then none is accepted.
    """
    found = []
    if calibrated < ENOUGH:
        found.append(
            "calibrate on 1,000 images or more. With four times the images the bands above are "
            "half as wide; and of subtly corrupted images of CIFAR-10, a gate calibrated on 200 "
            "images finds 81 % at alpha 0.05, one calibrated on 500 finds 90 % "
            "(docs/ood/measurements.md#few-images)"
        )
    shares = {name: share or 0.0 for name, share in rejected.items()}
    missed = [name for name in CORRUPTIONS if shares.get(name, 1.0) < MIN_GROSS]
    subtle = [shares[name] for name in SUBTLE if name in shares]
    if missed or (subtle and sum(subtle) / len(subtle) < MIN_SUBTLE):
        worst = missed or [name for name in SUBTLE if shares.get(name, 1.0) < MIN_SUBTLE]
        found.append(
            f"this model misses too many corrupted images ({'; '.join(worst)}): train one on your "
            "images. ade fit DIR --budget 20m did so for street scenes: AUROC 0.994 against "
            "CIFAR-10 (docs/training.md). It needs at least 800 images"
        )
    if not has_features:
        found.append(
            "this gate hardly sees what images show: ade encoder makes a network for that, and "
            "--features adds it. On CIFAR-10, whose classes are like ImageNet's, it raised the "
            "AUROC against unknown classes from 0.56 to 0.82, or with class folders to 0.85 "
            "(docs/ood.md#semantic-coordinates)"
        )
    return found
