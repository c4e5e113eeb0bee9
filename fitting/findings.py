"""Measures a finished fit on held-out images, for its report."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from export.verdict.corruptions import CORRUPTIONS
from export.verdict.what_if import corruptions_of, rejected
from fitting.encoder import ENCODER_ABOUT, recognised_share
from fitting.held_out import held_out_images, rows_of
from fitting.plan import Plan
from fitting.report import (
    ALPHAS,
    Caught,
    EncoderFindings,
    Findings,
    Outlier,
    false_alarms,
    write_report,
)
from fitting.survey import Survey, size_of
from serving.api.requests import InputImage
from serving.bulk import BulkOptions, FileScorer
from serving.engine.bundle import open_bundle
from serving.engine.engine import InferenceEngine
from serving.verdict.semantic import LOGITS
from training.data import Dataset
from training.datasets.files import shuffled
from training.runs import read_json

TEST_IMAGES = 2000
SCANNED_IMAGES = 4000  # training images, among which outliers are looked for
SHOWN_OUTLIERS = 24
SAMPLES = 64
RECONSTRUCTED = 12
CORRUPTED_IMAGES = 200  # for each kind of corruption


def report_on(plan: Plan, found: Survey, dataset: Dataset, bundle: Path, out: Path) -> None:
    """Measure the finished bundle and write ``OUT/report.html``.

    Args:
        plan: of the fit.
        found: what the survey of the folder found.
        dataset: the folder's images.
        bundle: that was made.
        out: the output folder.
    """
    opened = open_bundle(bundle)
    engine = InferenceEngine(opened, device="cpu")
    scorer = FileScorer(opened, Path(plan.folder), BulkOptions(resize="fit"))
    tested = [dataset.files["test"][row] for row in rows_of(dataset, found, "test")[:TEST_IMAGES]]
    p_values: dict[bool, list[float]] = {False: [], True: []}
    height, width, _ = opened.image_shape
    for row in scorer(tested):
        if row.get("p_value") is not None:
            size = size_of(Path(plan.folder) / row["path"])
            p_values[size != (width, height)].append(row["p_value"])
    scanned = shuffled(dataset.files["train"])[:SCANNED_IMAGES]
    rows = [row for row in scorer(scanned) if row.get("ood_score") is not None]
    rows.sort(key=lambda row: -row["ood_score"])
    index = {name: row for row, name in enumerate(dataset.files["train"])}
    outliers = [
        Outlier(
            row["path"],
            row["p_value"],
            row["bpd"],
            dataset.parts["train"].images[index[row["path"]]],
        )
        for row in rows[:SHOWN_OUTLIERS]
    ]
    recipes = [stage.recipe for stage in plan.stages]  # the last ones may have been given up
    used = plan.stages[: recipes.index(opened.manifest["recipe"]) + 1]
    pixels = held_out_images(dataset, found, CORRUPTED_IMAGES)
    held_out = pixels[:RECONSTRUCTED]
    findings = Findings(
        dataclasses.replace(plan, stages=used),
        found,
        opened,
        engine.sample([0] * SAMPLES, range(SAMPLES)),
        held_out,
        engine.reconstruct(held_out),
        false_alarms(p_values, opened),
        len(scanned),
        outliers,
        len(pixels),
        _caught(engine, pixels),
        _encoder_findings(engine, dataset, found, out),
    )
    write_report(findings, out / "report.html")


def _encoder_findings(
    engine: InferenceEngine, dataset: Dataset, found: Survey, out: Path
) -> EncoderFindings:
    """What became of the encoder, and how well it recognises the classes of test images."""
    about = read_json(out / ENCODER_ABOUT, "classes")
    if not about["classes"]:
        return EncoderFindings(**about)
    rows = rows_of(dataset, found, "test")[:TEST_IMAGES]
    logits = engine.features(np.asarray(dataset.parts["test"].images[rows]))[LOGITS]
    recognised, guessed = recognised_share(logits, dataset, "test", rows)
    return EncoderFindings(**about, recognised=recognised, guessed=guessed)


def _caught(engine: InferenceEngine, pixels: np.ndarray) -> list[Caught]:
    """Shares of corrupted held-out images that the verdict rejects."""
    images = [InputImage(its, []) for its in pixels]
    return [
        Caught(
            name,
            name in CORRUPTIONS,
            tuple(rejected(engine, engine.store.usable(), its, ALPHAS)),
        )
        for name, its in corruptions_of(images).items()
    ]
