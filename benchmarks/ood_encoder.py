"""From how many images on does an encoder pay?

An encoder is made for images of seven classes of CIFAR-10; those of the other three are OOD, and so
are corrupted images. As ``ade fit`` does, the encoder is made with the images to train on, and the
density is fitted to one held-out image for every twenty of them. A small encoder's training is
stopped by the clock: on a busy machine, look at the images seen.

    OMP_NUM_THREADS=1 python -m benchmarks.ood_encoder pretrained/cifar10 --root CIFAR10
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from export.verdict.corruptions import corrupted
from export.verdict.detector import fit_calibration
from export.verdict.measuring import statistics_of
from serving.engine.engine import InferenceEngine
from serving.verdict.semantic import FEATURES, LOGITS, OF_NETWORK, semantic_statistics
from training.data import ImageSet
from training.datasets import load_dataset
from training.encoder import TrainedEncoder, make_encoder
from training.small_encoder import train_small_encoder

HELD_OUT_CLASSES = (2, 4, 6)  # birds, deer and frogs, as in docs/ood.md
FIT, CALIBRATE, TEST, CORRUPTED = 400, 20, 600, 100
AT_A_TIME = 50  # images that an encoder sees at a time
KINDS = {"labels": "with labels", "none": "without labels", "small": "small, with labels"}
SHARE = 20  # training images for each image that the density is fitted to

Statistics = dict[str, np.ndarray]


def with_features(
    statistics: Statistics, images: np.ndarray, encoder: TrainedEncoder | None
) -> Statistics:
    """Statistics with an encoder's features instead of the bundle's, or without any."""
    kept = {name: values for name, values in statistics.items() if name not in OF_NETWORK}
    if encoder is None:
        return kept
    with torch.inference_mode():
        parts = [
            encoder.network(few) for few in torch.from_numpy(np.asarray(images)).split(AT_A_TIME)
        ]
    outputs = [torch.cat(values).numpy() for values in zip(*parts, strict=True)]
    kept |= semantic_statistics(dict(zip((FEATURES, LOGITS), outputs, strict=False)))
    return kept


def encoder_of(images: np.ndarray, labels: np.ndarray, kind: str, minutes: float) -> TrainedEncoder:
    """One of :data:`KINDS`, for these images."""
    if kind == "small":
        return train_small_encoder(ImageSet(images, labels), minutes, torch.device("cpu"))
    return make_encoder(ImageSet(images, labels if kind == "labels" else None))


def area(usual: np.ndarray, unusual: np.ndarray) -> float:
    """The AUROC of scores."""
    truth = np.repeat([0, 1], [len(usual), len(unusual)])
    return float(roc_auc_score(truth, np.append(usual, unusual)))


def areas(
    sets: dict[str, tuple[np.ndarray, Statistics]], encoder: TrainedEncoder | None, fit: int
) -> tuple[float, float]:
    """AUROC against the held-out classes, and its mean over corruptions."""
    found = {name: with_features(its, images, encoder) for name, (images, its) in sets.items()}
    first = {name: values[:fit] for name, values in found["fit"].items()}
    made = fit_calibration(first, found["calibrate"])
    scores = {name: made.scores_of(its) for name, its in found.items()}
    areas = {
        name: area(scores["test"], its)
        for name, its in scores.items()
        if name not in ("fit", "calibrate", "test")
    }
    classes = areas.pop("classes")
    return float(classes), float(np.mean(list(areas.values())))


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--root", required=True, help="folder of CIFAR-10")
    parser.add_argument("--images", type=int, nargs="+", default=[700, 2000, 8000])
    parser.add_argument("--minutes", type=float, default=2.0, help="to train small encoders")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    args = parser.parse_args()
    parts = load_dataset("cifar10", args.root).parts
    engine = InferenceEngine(args.bundle, device="cpu", operations=["score"])
    labels = np.asarray(parts["test"].labels)
    known = np.flatnonzero(~np.isin(labels, HELD_OUT_CLASSES))[: FIT + CALIBRATE + TEST]
    fit, calibrate, test = np.split(known, [FIT, FIT + CALIBRATE])
    others = np.flatnonzero(np.isin(labels, HELD_OUT_CLASSES))[:TEST]
    chosen = {"fit": fit, "calibrate": calibrate, "test": test, "classes": others}
    pixels = {name: np.asarray(parts["test"].images[rows]) for name, rows in chosen.items()}
    pixels |= corrupted(pixels["test"][:CORRUPTED])
    sets = {name: (its, statistics_of(engine, its, name)) for name, its in pixels.items()}
    train_labels = np.asarray(parts["train"].labels)
    rows = np.flatnonzero(~np.isin(train_labels, HELD_OUT_CLASSES))
    print(
        "| images | encoder | images seen | held-out classes | corruptions |\n|---|---|---|---|---|"
    )
    for count in args.images:
        amount = min(FIT, max(20, count // SHARE))
        print(f"| {count} | none | | {' | '.join(f'{a:.3f}' for a in areas(sets, None, amount))} |")
        chosen_rows = np.sort(rows[:count])
        for kind in args.kinds:
            images = np.asarray(parts["train"].images[chosen_rows])
            encoder = encoder_of(images, train_labels[chosen_rows], kind, args.minutes)
            found = " | ".join(f"{a:.3f}" for a in areas(sets, encoder, amount))
            print(f"| {count} | {KINDS[kind]} | {encoder.images_seen} | {found} |", flush=True)


if __name__ == "__main__":
    main()
