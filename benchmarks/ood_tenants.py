"""Measures whether false alarms have the chosen rate for each of many tenants.

A tenant sends images of some classes of CIFAR-10, all changed in one way: JPEG, brightness,
contrast, a slight blur, or not at all. Each has its own calibration: 200 images fit the density and
300 calibrate it. Then 400 other images of the same kind are judged. Given a calibration, the number
of false alarms follows a Beta-Binomial distribution: about 19 of 20 tenants should lie inside its
95 % band. The images are held-out ones and test images; nothing was trained on them.

    OMP_NUM_THREADS=1 python -m benchmarks.ood_tenants pretrained/cifar10 --root DIR
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np

from export.gate.corruptions import blur, jpeg
from export.gate.density_fit import fit_seen
from export.gate.measuring import statistics_of
from serving.engine.bundle import open_bundle
from serving.engine.engine import InferenceEngine
from serving.verdict.conformal import conformal_p_values
from serving.verdict.false_alarms import false_alarm_band
from training.datasets import load_dataset

TENANTS = 20
FIT, CALIBRATE, TEST = 200, 300, 400
ALPHAS = (0.1, 0.05, 0.01)
CLASSES = (2, 6)  # smallest and largest number of a tenant's

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


def shares_of(
    engine: InferenceEngine, images: np.ndarray, labels: np.ndarray, tenant: int
) -> tuple[str, list[float]]:
    """A description of a tenant's images, and the share of test images rejected at each alpha."""
    rng = np.random.default_rng(tenant)
    classes = np.sort(rng.choice(10, rng.integers(*CLASSES, endpoint=True), replace=False))
    name = list(CHANGES)[tenant % len(CHANGES)]
    rows = rng.permutation(np.flatnonzero(np.isin(labels, classes)))[: FIT + CALIBRATE + TEST]
    look_of = engine.calibrations.look_of
    found = statistics_of(engine, CHANGES[name](images[rows]), name, look_of=look_of)
    fit, calibrate, test = (
        {key: values[part] for key, values in found.items()}
        for part in (slice(FIT), slice(FIT, FIT + CALIBRATE), slice(FIT + CALIBRATE, None))
    )
    calibration = fit_seen(fit, calibrate, look_of(False))
    scores = calibration.scores_of(test)
    p_values = conformal_p_values(calibration.scores, scores)
    shares = [float((p_values <= alpha).mean()) for alpha in ALPHAS]
    return f"classes {' '.join(map(str, classes))}, {name}", shares


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--root", required=True, help="folder of CIFAR-10")
    parser.add_argument("--tenants", type=int, nargs="+", default=list(range(TENANTS)))
    args = parser.parse_args()
    engine = InferenceEngine(open_bundle(args.bundle), device="cpu", operations=["score"])
    parts = load_dataset("cifar10", args.root).parts
    used = [parts[name] for name in ("select", "calibrate", "test")]
    images = np.concatenate([part.images[:] for part in used])
    labels = np.concatenate([np.asarray(part.labels) for part in used])
    bands = [false_alarm_band(CALIBRATE, alpha, tested=TEST) for alpha in ALPHAS]
    inside = [0] * len(ALPHAS)
    print(f"| tenant | images | {' | '.join(f'at {alpha}' for alpha in ALPHAS)} |")
    print(f"|---|---|{'---|' * len(ALPHAS)}")
    for tenant in args.tenants:
        name, shares = shares_of(engine, images, labels, tenant)
        cells = []
        for i, (share, (low, high)) in enumerate(zip(shares, bands, strict=True)):
            is_inside = low <= share <= high
            inside[i] += is_inside
            cells.append(f"{share:.4f}{'' if is_inside else ' outside'}")
        print(f"| {tenant} | {name} | {' | '.join(cells)} |", flush=True)
    for alpha, count, (low, high) in zip(ALPHAS, inside, bands, strict=True):
        print(f"alpha {alpha}: {count} of {len(args.tenants)} inside {low:.4f} to {high:.4f}")


if __name__ == "__main__":
    main()
