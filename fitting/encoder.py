"""Makes the verdict's encoder for ``ade fit``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from scipy import stats

from ade_base.system import cpu_session
from export.feature_source import FeatureSource
from export.to_onnx import export_encoder
from fitting.held_out import rows_of
from fitting.plan import Plan
from fitting.survey import Survey
from serving.verdict.semantic import LOGITS
from training.data import Dataset, ImageSet, Report
from training.datasets.sketch import record_of
from training.encoder import TrainedEncoder, make_encoder
from training.labels import class_folders, class_labels, listed
from training.runs import write_json

ENCODER_NAME, ENCODER_ABOUT = "encoder.onnx", "encoder.json"
MAX_TESTED = 2000  # images on which an encoder is tested
AT_A_TIME = 256  # images that the encoder recognises at a time
MAX_GUESSING = 0.01  # probability that an encoder which only guesses is used


def fit_encoder(
    plan: Plan, found: Survey, dataset: Dataset, out: Path, step: Report
) -> FeatureSource:
    """Make the verdict's encoder, with a classifier if the images lie in class folders.

    If it recognises the classes of held-out images no better than guessing, it does without them.

    Args:
        plan: of the fit.
        found: what the survey of the folder found.
        dataset: the folder's images.
        out: the output folder; an encoder that is there already is taken.
        step: called with each line of progress.
    """
    path, about_path = out / ENCODER_NAME, out / ENCODER_ABOUT
    if about_path.exists():
        return FeatureSource(path)
    images = dataset.parts["train"].images

    def write(labels: np.ndarray | None) -> TrainedEncoder:
        record = record_of(dataset) if labels is not None else None
        made = make_encoder(ImageSet(images, labels))
        export_encoder(
            made.network,
            np.asarray(images[:2]),
            made.outputs,
            path,
            record if made.classes else None,
        )
        return made

    labels = class_labels(dataset) if plan.has_classes else None
    if labels is None:
        step("making an encoder")
    else:
        folders = class_folders(dataset.files["train"]) or []
        step(f"making an encoder for {len(folders)} classes: {listed(folders)}")
    made = write(labels)
    is_given_up = made.classes > 0 and not _recognises_classes(path, dataset, found)
    if is_given_up:
        step("the encoder recognises the classes no better than guessing: it does without them")
        made = write(None)
    about = {
        "images_seen": made.images_seen,
        "classes": made.classes,
        "is_given_up": is_given_up,
    }
    write_json(about_path, about)
    return FeatureSource(path)


def _recognises_classes(path: Path, dataset: Dataset, found: Survey) -> bool:
    """Whether an encoder recognises the classes of held-out images better than by guessing."""
    rows = rows_of(dataset, found, "select")[:MAX_TESTED]
    images = dataset.parts["select"].images
    session = cpu_session(path, torch.get_num_threads())
    parts = [rows[first : first + AT_A_TIME] for first in range(0, len(rows), AT_A_TIME)]
    logits = np.concatenate(
        [session.run([LOGITS], {"images": np.asarray(images[few])})[0] for few in parts]
    )
    recognised, guessed = recognised_share(logits, dataset, "select", rows)
    test = stats.binomtest(round(recognised * len(rows)), len(rows), guessed, alternative="greater")
    return bool(test.pvalue < MAX_GUESSING)


def recognised_share(
    logits: np.ndarray, dataset: Dataset, part: str, rows: list[int]
) -> tuple[float, float]:
    """Share of held-out images whose class is recognised, and that in the largest class."""
    trained, labels = class_labels(dataset), class_labels(dataset, part)
    assert trained is not None and labels is not None
    held_out = labels[rows]
    largest = np.bincount(trained).argmax()
    return float(np.mean(logits.argmax(1) == held_out)), float(np.mean(held_out == largest))
