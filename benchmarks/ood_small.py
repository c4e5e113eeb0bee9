"""How best to calibrate on few images: by splitting them, or by cross-conformal p-values.

Of CIFAR-10's test images, folders of 200, 500 and 1,000 are drawn. Split conformal p-values fit the
density to a share of the folder and calibrate on the rest. Cross-conformal ones (Vovk,
"Cross-conformal predictors", 2015) fit five densities, each to four fifths, and compare an image
with the remaining fifth under each of them: every image both fits and calibrates, and the smallest
p-value is 1/(n + 1) for all n of them. What is promised is less: at alpha at most about 2 alpha of
in-distribution images are rejected (Barber et al., "Predictive inference with the jackknife+",
2021).

Measured on 1,000 other test images and on corrupted ones; no real OOD data set is used.

    OMP_NUM_THREADS=1 python -m benchmarks.ood_small pretrained/cifar10 --root CIFAR10
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np

from export.verdict.corruptions import CORRUPTIONS, corrupted
from export.verdict.detector import fit_calibration
from export.verdict.measuring import statistics_of
from serving.engine.engine import InferenceEngine
from serving.verdict.conformal import conformal_p_values
from training.datasets import load_dataset

FOLDERS = (200, 500, 1000)
SHARES = (0.2, 0.4, 0.6)
FOLDS = 5
DRAWS = 12
POOL, TEST, CORRUPTED = 2000, 1000, 100
ALPHAS = (0.1, 0.05, 0.01)

Statistics = dict[str, np.ndarray]


def part(statistics: Statistics, rows: np.ndarray) -> Statistics:
    return {name: values[rows] for name, values in statistics.items()}


def split(
    folder: Statistics, judged: list[Statistics], order: np.ndarray, share: float
) -> list[np.ndarray]:
    """p-values of each set of images."""
    first = round(share * len(order))
    made = fit_calibration(part(folder, order[:first]), part(folder, order[first:]))
    return [conformal_p_values(made.scores, made.scores_of(its)) for its in judged]


def crossed(folder: Statistics, judged: list[Statistics], order: np.ndarray) -> list[np.ndarray]:
    """The same with :data:`FOLDS` densities."""
    above = [np.zeros(len(its["bpd"])) for its in judged]
    folds = np.array_split(order, FOLDS)
    for k, fold in enumerate(folds):
        rest = np.concatenate(folds[:k] + folds[k + 1 :])
        made = fit_calibration(part(folder, rest), part(folder, fold))
        for counts, its in zip(above, judged, strict=True):
            counts += len(fold) - np.searchsorted(made.scores, made.scores_of(its), "left")
    return [(1 + counts) / (len(order) + 1) for counts in above]


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--root", required=True, help="folder of CIFAR-10")
    args = parser.parse_args()
    engine = InferenceEngine(args.bundle, device="cpu", operations=["score"])
    images = np.asarray(load_dataset("cifar10", args.root).parts["test"].images[: POOL + TEST])
    pool = statistics_of(engine, images[:POOL], "pool")
    judged = [statistics_of(engine, images[POOL:], "test")]
    gross = len(CORRUPTIONS)
    for name, changed in corrupted(images[-CORRUPTED:]).items():
        judged.append(statistics_of(engine, changed, name))
    methods: dict[str, Callable[[Statistics, list[Statistics], np.ndarray], list[np.ndarray]]] = {
        f"split, {share:.0%} fit": lambda folder, its, order, share=share: split(  # type: ignore[misc]
            folder, its, order, share
        )
        for share in SHARES
    }
    methods[f"cross-conformal, {FOLDS} folds"] = crossed
    alarms = " | ".join(f"false alarms at {alpha}" for alpha in ALPHAS)
    found = " | ".join(f"{kind} at {alpha}" for kind in ("gross", "subtle") for alpha in ALPHAS[1:])
    print(f"| images | method | {alarms} | {found} |")
    print(f"|---|---|{'---|' * (len(ALPHAS) + 4)}")
    for count in FOLDERS:
        for name, method in methods.items():
            rejected = []
            for draw in range(DRAWS):
                order = np.random.default_rng(draw).permutation(POOL)[:count]
                p_values = method(pool, judged, order)
                rejected.append([[(p <= alpha).mean() for alpha in ALPHAS] for p in p_values])
            shares = np.array(rejected)  # (draws, sets, alphas)
            mean, sd = shares.mean(0), shares[:, 0].std(0)
            cells = [f"{m:.3f} ± {s:.3f}" for m, s in zip(mean[0], sd, strict=True)]
            for kind in (mean[1 : 1 + gross], mean[1 + gross :]):
                cells += [f"{its:.3f}" for its in kind.mean(0)[1:]]
            print(f"| {count} | {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
