"""False-alarm rates of the verdict on CIFAR-10's test images, for several calibrations.

Each calibration splits the 5,000 held-out images at random, 2,000 to fit and 3,000 to calibrate.
Given a calibration on n images, the number of rejected ones among m others has a beta-binomial
distribution.

``python -m benchmarks.ood_false_alarms pretrained/cifar10 --root CIFAR10``
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from export.gate.density_fit import fit_seen
from export.gate.measuring import statistics_of
from serving.engine.engine import InferenceEngine
from serving.verdict.conformal import conformal_p_values
from serving.verdict.false_alarms import false_alarm_band
from training.datasets import load_dataset

ALPHAS = (0.1, 0.05, 0.01)
SPLITS = 3
FIT = 2000
LEVEL = 1 - 0.05 / (len(ALPHAS) * SPLITS)  # all bands hold at once with 95 %


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
        look_of=engine.calibrations.look_of,
    )
    test = statistics_of(
        engine, parts["test"].images[:], "test", look_of=engine.calibrations.look_of
    )
    count, m = len(held_out["bpd"]), len(test["bpd"])
    print(f"{m:,} test images, band of {LEVEL:.4%}\n")
    print("| split | alpha | rejected | band | |\n|---|---|---|---|---|")
    for split in range(SPLITS):
        order = np.random.default_rng(split).permutation(count) if split else np.arange(count)
        fitted = fit_seen(
            {k: v[order[:FIT]] for k, v in held_out.items()},
            {k: v[order[FIT:]] for k, v in held_out.items()},
            engine.calibrations.look_of(False),
        )
        p_values = conformal_p_values(fitted.scores, fitted.scores_of(test))
        for alpha in ALPHAS:
            low, high = false_alarm_band(count - FIT, alpha, LEVEL, m)
            rejected = float((p_values <= alpha).mean())
            name = f"random {split}" if split else "as shipped"
            place = "inside" if low <= rejected <= high else "OUTSIDE"
            print(f"| {name} | {alpha} | {rejected:.4f} | {low:.4f} to {high:.4f} | {place} |")


if __name__ == "__main__":
    main()
