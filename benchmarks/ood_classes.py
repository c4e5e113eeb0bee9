"""Are images of classes noticed that neither the encoder nor the calibration has seen?

Three times, an encoder is made for the training images of seven classes of CIFAR-10, the density is
fitted to held-out images of these, and images of the three other classes are OOD. So are
corrupted images. The table has AUROCs of the served score, of its parts, and of a score that
judges all classes alike. Distance and weight were chosen on these splits.

A small encoder's training is stopped by the clock: on a busy machine, look at the images seen.

    OMP_NUM_THREADS=1 python -m benchmarks.ood_classes pretrained/cifar10 --root CIFAR10
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from export.gate.corruptions import CORRUPTIONS, SUBTLE, corrupted
from export.gate.density_fit import fit_calibration
from export.gate.measuring import statistics_of
from serving.engine.engine import InferenceEngine
from serving.verdict.semantic import (
    COORDINATES,
    FEATURES,
    LOGITS,
    OF_NETWORK,
    PROBABILITIES,
    semantic_statistics,
)
from training.data import ImageSet
from training.datasets import load_dataset
from training.encoder import TrainedEncoder, make_encoder
from training.small_encoder import train_small_encoder

SPLITS = ((2, 4, 6), (0, 3, 9), (1, 5, 8))  # birds, deer, frogs; planes, cats, trucks; cars, …
FIT, CORRUPTED = 2000, 210
TEST, OTHERS = "test", "classes"
AT_A_TIME = 50  # images that an encoder sees at a time
KINDS = {"labels": "with labels", "none": "without labels", "small": "small, with labels"}

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
    sets: dict[str, tuple[np.ndarray, Statistics]], encoder: TrainedEncoder | None
) -> dict[str, tuple[float, float, float]]:
    """AUROCs by the score: against held-out classes, subtle corruptions and gross ones."""
    found = {name: with_features(its, images, encoder) for name, (images, its) in sets.items()}
    scores = _scores(found, "served" if encoder else "56 statistics")
    if encoder is not None and encoder.classes:
        alike = {
            name: {key: values for key, values in its.items() if key != PROBABILITIES}
            for name, its in found.items()
        }
        scores |= _scores(alike, "all classes judged alike")

    def mean(its: dict[str, np.ndarray], names: Iterable[str]) -> float:
        return float(np.mean([area(its[TEST], its[name]) for name in names]))

    return {
        name: (mean(its, [OTHERS]), mean(its, SUBTLE), mean(its, CORRUPTIONS))
        for name, its in scores.items()
    }


def _scores(found: dict[str, Statistics], name: str) -> dict[str, dict[str, np.ndarray]]:
    """The OOD scores of a calibration fitted to ``fit``, and its coordinates, by set."""
    made = fit_calibration(found["fit"], found[TEST])  # the calibration half changes no score
    rows = {key: made.rows(its) for key, its in found.items()}
    scores = {name: {key: made.ood_scores(made.normal(its)) for key, its in rows.items()}}
    for coordinate in filter(made.names.__contains__, COORDINATES):
        column = made.names.index(coordinate)
        scores[f"{name}: `{coordinate}` alone"] = {k: its[:, column] for k, its in rows.items()}
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--root", required=True, help="folder of CIFAR-10")
    parser.add_argument("--minutes", type=float, default=5, help="to train small encoders")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    args = parser.parse_args()
    parts = load_dataset("cifar10", args.root).parts
    engine = InferenceEngine(args.bundle, device="cpu", operations=["score"])
    held_out = [parts[part] for part in ("select", "calibrate")]
    pixels = np.concatenate([np.asarray(part.images[:]) for part in held_out])
    labels = np.concatenate([np.asarray(part.labels) for part in held_out])
    statistics = statistics_of(engine, pixels, "held out")
    train_labels = np.asarray(parts["train"].labels)
    print("| held-out classes | encoder | images seen | score | classes | subtle | gross |")
    print("|---|---|---|---|---|---|---|")
    for split in SPLITS:
        known = np.random.default_rng(0).permutation(np.flatnonzero(~np.isin(labels, split)))
        rows = {"fit": known[:FIT], TEST: known[FIT:], OTHERS: np.isin(labels, split)}
        sets = {
            name: (pixels[its], {k: v[its] for k, v in statistics.items()})
            for name, its in rows.items()
        }
        for name, changed in corrupted(sets[TEST][0][:CORRUPTED]).items():
            sets[name] = (changed, statistics_of(engine, changed, name))
        assert all(len(images) == len(its["bpd"]) for images, its in sets.values())
        chosen = np.flatnonzero(~np.isin(train_labels, split))
        for kind in ("", *args.kinds):
            encoder = None
            if kind:
                images = np.asarray(parts["train"].images[chosen])
                encoder = encoder_of(images, train_labels[chosen], kind, args.minutes)
            about = KINDS.get(kind, "none")
            for score, found in areas(sets, encoder).items():
                seen = "" if encoder is None else f"{encoder.images_seen:,}"
                figures = " | ".join(f"{value:.3f}" for value in found)
                print(f"| {split} | {about} | {seen} | {score} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
