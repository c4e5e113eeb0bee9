"""Do false alarms come at the chosen rate for each of many tenants?

A tenant sends images of some classes of CIFAR-10, all changed in one way: JPEG, brightness,
contrast, a slight blur, or not at all. Each gets a calibration of its own from 200 images that fit
the density and 300 that calibrate it; 400 other images of the same kind are judged. Given a
calibration, the number of false alarms follows a Beta-Binomial distribution: about 19 of 20 tenants
should lie inside its 95 % band. The images are held-out ones and test images; nothing was trained
on them.

    OMP_NUM_THREADS=1 python -m benchmarks.ood_tenants pretrained/cifar10 --root DIR
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from export.verdict.calibrate import statistics_of
from export.verdict.corruptions import blur, jpeg
from export.verdict.detector import fit_calibration
from serving.engine.bundle import open_bundle
from serving.engine.engine import InferenceEngine
from serving.verdict.calibration import conformal_p_values
from serving.verdict.false_alarms import false_alarm_band
from training.datasets import load_dataset

TENANTS = 20
FIT, CALIBRATE, TEST = 200, 300, 400
ALPHAS = (0.1, 0.05, 0.01)
CLASSES = (2, 6)  # fewest and most of a tenant's

Change = Callable[[np.ndarray], np.ndarray]


def brightness(images: np.ndarray, factor: float) -> np.ndarray:
    """Every value times a factor."""
    return np.clip(np.rint(images * factor), 0, 255).astype(np.uint8)


def contrast(images: np.ndarray, factor: float) -> np.ndarray:
    """Every value's distance from the middle times a factor."""
    return np.clip(np.rint(127.5 + (images - 127.5) * factor), 0, 255).astype(np.uint8)


CHANGES: dict[str, Change] = {
    "unchanged": lambda images: images,
    "JPEG, quality 90": lambda images: jpeg(images, 90),
    "JPEG, quality 50": lambda images: jpeg(images, 50),
    "JPEG, quality 20": lambda images: jpeg(images, 20),
    "darker, factor 0.5": lambda images: brightness(images, 0.5),
    "brighter, factor 1.5": lambda images: brightness(images, 1.5),
    "contrast 0.6": lambda images: contrast(images, 0.6),
    "blurred, σ = 0.7": lambda images: blur(images, 0.7),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--root", required=True, help="folder of CIFAR-10")
    parser.add_argument("--tenants", type=int, default=TENANTS)
    args = parser.parse_args()
    engine = InferenceEngine(open_bundle(args.bundle), device="cpu", operations=["score"])
    parts = load_dataset("cifar10", args.root).parts
    used = [parts[name] for name in ("select", "calibrate", "test")]
    images = np.concatenate([part.images[:] for part in used])
    labels = np.concatenate([np.asarray(part.labels) for part in used])
    inside = dict.fromkeys(ALPHAS, 0)
    print("| tenant | classes | images | " + " | ".join(f"at {alpha}" for alpha in ALPHAS) + " |")
    print("|---|---|---|" + "---|" * len(ALPHAS))
    for tenant in range(args.tenants):
        rng = np.random.default_rng(tenant)
        classes = np.sort(rng.choice(10, rng.integers(*CLASSES, endpoint=True), replace=False))
        name = list(CHANGES)[tenant % len(CHANGES)]
        rows = rng.permutation(np.flatnonzero(np.isin(labels, classes)))[: FIT + CALIBRATE + TEST]
        found = statistics_of(engine, CHANGES[name](images[rows]), name)
        fit, calibrate, test = (
            {key: values[part] for key, values in found.items()}
            for part in (slice(FIT), slice(FIT, FIT + CALIBRATE), slice(FIT + CALIBRATE, None))
        )
        calibration = fit_calibration(fit, calibrate)
        scores = calibration.mixture.surprise(calibration.normal(calibration.rows(test)))
        p_values = conformal_p_values(calibration.scores, scores)
        cells = []
        for alpha in ALPHAS:
            share = float((p_values <= alpha).mean())
            low, high = false_alarm_band(CALIBRATE, alpha, tested=len(p_values))
            inside[alpha] += low <= share <= high
            cells.append(f"{share:.4f}{'' if low <= share <= high else ' outside'}")
        listed = " ".join(map(str, classes))
        print(f"| {tenant} | {listed} | {name} | {' | '.join(cells)} |", flush=True)
    for alpha in ALPHAS:
        low, high = false_alarm_band(CALIBRATE, alpha, tested=TEST)
        print(
            f"alpha {alpha}: {inside[alpha]} of {args.tenants} inside {low:.4f} to {high:.4f}",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main()
