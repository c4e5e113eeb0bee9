"""Does the verdict keep its promise? Realised false-alarm rates on CIFAR-10's test images, for
several calibrations.

The 5,000 held-out images are split anew each time, 2,000 to fit and 3,000 to calibrate. Given a
calibration on n images, the number of flagged ones among m others follows a beta-binomial law.

``python -m benchmarks.ood_false_alarms pretrained/cifar10 --root CIFAR10``
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
from scipy import stats

from export.verdict.calibrate import statistics_of
from export.verdict.detector import fit_calibration
from serving.engine.engine import InferenceEngine
from serving.verdict.calibration import conformal_p_values
from training.datasets import load_dataset

ALPHAS = (0.1, 0.05, 0.01)
SPLITS = 3
FIT = 2000
LEVEL = 1 - 0.05 / (len(ALPHAS) * SPLITS)  # all of them at once, at 95 %


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--root", required=True)
    args = parser.parse_args()
    parts = load_dataset("cifar10", args.root).parts
    engine = InferenceEngine(args.bundle, device="cpu", operations=["score"])
    held_out = statistics_of(
        engine,
        np.concatenate([parts["select"].images[:], parts["calibrate"].images[:]]),
        "held out",
    )
    test = statistics_of(engine, parts["test"].images[:], "test")
    count, m = len(held_out["bpd"]), len(test["bpd"])
    print(
        f"{m:,} test images, band of {LEVEL:.4%}\n\n| split | alpha | flagged | band | |\n|---|---|---|---|---|"
    )
    for split in range(SPLITS):
        order = np.random.default_rng(split).permutation(count) if split else np.arange(count)
        fitted = fit_calibration(
            {k: v[order[:FIT]] for k, v in held_out.items()},
            {k: v[order[FIT:]] for k, v in held_out.items()},
        )
        p_values = conformal_p_values(
            fitted.scores, fitted.surprise(fitted.normal(fitted.rows(test)))
        )
        n = count - FIT
        for alpha in ALPHAS:
            k = math.floor(alpha * (n + 1))
            low, high = stats.betabinom.ppf([(1 - LEVEL) / 2, (1 + LEVEL) / 2], m, k, n + 1 - k)
            flagged = int((p_values <= alpha).sum())
            print(
                f"| {'as shipped' if split == 0 else f'anew {split}'} | {alpha} | {flagged / m:.4f} | "
                f"{low / m:.4f} to {high / m:.4f} | {'inside' if low <= flagged <= high else 'OUTSIDE'} |"
            )


if __name__ == "__main__":
    main()
