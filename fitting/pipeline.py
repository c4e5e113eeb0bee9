"""The steps of a fitting: read, train, measure, export, calibrate and report.

A finished step is not repeated when a fitting is resumed. The output folder holds the plan
(``plan.json``), the survey of the images (``survey.json``), the training run (``run``), the
verdict's encoder (``encoder.onnx``), the bundle before and after its calibration
(``exported`` and ``bundle``) and the report (``report.html``).
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ade_model.checkpoint import load_model, read_config
from export.feature_source import FeatureSource
from export.gate.calibrate import calibrate_bundle
from export.gate.images import readable
from export.gate.split import MAX_CALIBRATING, MAX_FITTED
from export.parity import ParityError, parity_images
from export.write import export_bundle
from fitting.encoder import ENCODER_ABOUT, fit_encoder
from fitting.findings import report_on
from fitting.held_out import rows_of
from fitting.plan import REST_MINUTES, Plan, PlanError, minutes_text
from fitting.survey import Sizes, Survey, are_larger, as_dict, summary_lines, survey
from serving.engine.bundle import MANIFEST_NAME
from training.data import DataError, Dataset, Report
from training.datasets.files import few_names_hint, unusable_hint
from training.datasets.folder import load_files
from training.loop import train
from training.measure import Measurer
from training.run_options import NO_LIMIT, RunOptions
from training.run_start import last_of_likelihood
from training.runs import alone_in, latest_checkpoint, read_json, write_json
from training.step import TrainingDiverged

MEASURED_IMAGES = 250  # more would take minutes, after the training
MIN_IMAGES = {"select": 20, "calibrate": 20, "test": 2}
ENOUGH = 800  # images, of which a twenty-fifth is the part select
SURVEY_NAME = "survey.json"
RUN_NAME = "run"
GIVEN_UP = "given-up.json"  # in a run that diverged after the adversary took part


@dataclass(frozen=True)
class Fitted:
    """Paths of the results."""

    bundle: Path
    report: Path


def fit_folder(plan: Plan, files: list[Path], sizes: Sizes, out: Path, say: Report) -> Fitted:
    """Do the steps of a plan that are not finished yet.

    Args:
        plan: as :func:`fitting.plan.make_plan` makes it.
        files: the images of the plan's folder, as :func:`training.datasets.folder.image_files`
            finds them.
        sizes: of the files, as :func:`fitting.survey.picture_sizes` counts them.
        out: the output folder.
        say: called with each line of progress.

    Raises:
        PlanError: the output folder was begun with another plan, is exported with another licence,
            or holds results but no fitting.
        DataError: the images are too few, or cannot be used.
        RunError: another process works in the output folder.
        ConfigError: the image size does not suit the networks.
    """
    check_plan(plan, out)  # before anything is written
    with alone_in(out):
        return _fit(plan, files, sizes, out, say)


def _fit(plan: Plan, files: list[Path], sizes: Sizes, out: Path, say: Report) -> Fitted:
    started = time.monotonic()
    _keep_plan(plan, out)

    def step(text: str) -> None:
        say(f"[{(time.monotonic() - started) / 60:5.1f} of {plan.budget:g} min] {text}")

    def read(line: str) -> None:
        if not line.startswith("skipped"):  # the survey names them
            step(line)

    if plan.rest < REST_MINUTES and not has_begun(out):
        step(
            "the steps after training take about 2 minutes: this budget leaves "
            f"{minutes_text(plan.rest)} and will be exceeded"
        )
    folder = Path(plan.folder)
    step(f"reading {folder}")
    # What was left out stays so even if it can be read by now: the parts must not change.
    left_out = survey_before(out).get("broken", {})
    dataset = load_files(folder, files, plan.image_size, out / "cache", read, left_out=left_out)
    found = _survey(folder, files, sizes, dataset, out)
    for line in summary_lines(found):
        step(line)
    # Of larger pictures, the gate's encoder sees the originals, and not what the model sees.
    encoder = (
        None if are_larger(sizes, plan.image_size) else fit_encoder(plan, found, dataset, out, step)
    )
    checkpoints = _train(plan, dataset, out, step)
    bundle = _bundle(plan, found, dataset, checkpoints, encoder, out, step)
    if not (out / "report.html").exists():
        step("looking for outliers among the images")
        report_on(plan, found, dataset, bundle, out)
    step("done")
    return Fitted(bundle, out / "report.html")


def has_begun(out: Path) -> bool:
    """Whether anything was trained: from then on neither the plan nor the images may change."""
    trained = (out / RUN_NAME / "run.json", out / ENCODER_ABOUT)
    return (out / "plan.json").exists() and any(path.exists() for path in trained)


def check_plan(plan: Plan, out: Path) -> None:
    """Check that a plan can be begun in an output folder, or resumed there.

    Raises:
        PlanError: as :func:`fit_folder`.
        ConfigError: the image size does not suit the networks.
    """
    plan.config()
    if not has_begun(out):
        _check_unused(out)
        return
    try:
        plan.check_resumes(Plan.load(out / "plan.json"))
    except PlanError as error:
        raise PlanError(f"{out}: {error}, or choose another output folder") from None
    if (out / "exported").exists():
        _check_licence(plan, out / "exported")


def _keep_plan(plan: Plan, out: Path) -> None:
    check_plan(plan, out)
    if not (has_begun(out) and (out / "exported").exists()):  # then its licence is decided
        write_json(out / "plan.json", plan.to_dict())


def _check_licence(plan: Plan, exported: Path) -> None:
    licence = read_json(exported / MANIFEST_NAME).get("licence")
    if plan.licence not in (None, licence):
        raise PlanError(
            f"{exported} has {f'the licence {licence}' if licence else 'no licence'} and cannot "
            f"take {plan.licence}: leave the licence out, or choose another output folder"
        )


def _check_unused(out: Path) -> None:
    """Check that a folder holds nothing that this fitting would take for its own.

    Raises:
        PlanError: it does.
    """
    names = ["exported", "bundle", "report.html"]
    try:
        Plan.load(out / "plan.json")  # of a fitting that ended before it trained anything
    except (PlanError, OSError):
        names += ["plan.json", SURVEY_NAME, RUN_NAME, ENCODER_ABOUT]
    if found := [name for name in names if os.path.lexists(out / name)]:
        raise PlanError(
            f"{out} holds {', '.join(found)}, but no fitting that can be resumed: choose another "
            "output folder"
        )


def survey_before(out: Path) -> dict[str, Any]:
    """The survey of a fitting that has trained something; empty without one."""
    path = out / SURVEY_NAME
    found: dict[str, Any] = read_json(path) if path.exists() and has_begun(out) else {}
    return found


def _survey(folder: Path, files: list[Path], sizes: Sizes, dataset: Dataset, out: Path) -> Survey:
    found = survey(sizes, dataset)
    for part, least in MIN_IMAGES.items():
        is_fitted = part == "select"
        usable = found.fitted if is_fitted else found.parts[part]
        if usable < least:
            copies = sum(len(group) - 1 for group in found.twice)
            unusable = f"{len(found.broken)}{unusable_hint(dataset.skipped)}"
            raise DataError(
                f"{folder}: of {found.files} files (unusable: {unusable}; copies: {copies}), the "
                f"part {part} gets {usable} images and needs at least {least}"
                + ", not counting copies of each other and of those in calibrate" * is_fitted
                + f"; about {ENOUGH} different images are needed" * (found.files < ENOUGH)
                + few_names_hint([file.name for file in files])
            )
    if (before := survey_before(out)) and (change := found.change_since(before)):
        raise PlanError(
            f"{folder} has changed since {out} was begun ({change}): "
            "restore it, or choose another output folder"
        )
    write_json(out / SURVEY_NAME, as_dict(found))
    return found


def _train(plan: Plan, dataset: Dataset, out: Path, step: Report) -> list[Path]:
    """Train, and return the checkpoints that can be used, the best first.

    If training diverges or its model cannot be exported, there is the one from before the adversary
    took part. The seed is one of the output folder's name, so that another name helps if training
    diverges before.
    """
    run = out / RUN_NAME
    if not (run / GIVEN_UP).exists() and not (run / "report.md").exists():
        step(f"training {plan.recipe}, {minutes_text(plan.minutes)} minutes")
        options = RunOptions(
            images=NO_LIMIT,
            minutes=plan.minutes,
            seed=zlib.crc32(out.resolve().name.encode()),
            device=plan.device,
            checkpoint_minutes=2.0,
        )
        try:
            with alone_in(run):
                train(plan.config(), dataset, run, options, resume=(run / "run.json").exists())
        except TrainingDiverged as error:
            if last_of_likelihood(run) is None:
                raise TrainingDiverged(
                    f"{error}; give an output folder of another name than {out} to try again with "
                    "other random numbers"
                ) from error
            step(f"{error}; the model from before the adversary is used")
            write_json(run / GIVEN_UP, {"error": str(error)})
    before = last_of_likelihood(run)
    usable = [] if before is None else [before]
    return usable if (run / GIVEN_UP).exists() else [latest_checkpoint(run), *usable]


def _bundle(
    plan: Plan,
    found: Survey,
    dataset: Dataset,
    checkpoints: list[Path],
    encoder: FeatureSource | None,
    out: Path,
    step: Report,
) -> Path:
    """Measure, export and calibrate; returns the bundle.

    A model whose graphs differ from it is given up for that from before the adversary.
    """
    exported, bundle = out / "exported", out / "bundle"
    for name in (exported.name, bundle.name):
        for unfinished in out.glob(f".{name}.*.tmp"):  # of a process that was killed
            shutil.rmtree(unfinished)
    for checkpoint in checkpoints:
        if exported.exists():
            break
        try:
            _export(plan, found, dataset, checkpoint, exported, step)
        except ParityError as error:
            if checkpoint == checkpoints[-1]:
                raise
            step(f"{error}; the model from before the adversary is used")
    if not bundle.exists():
        step("calibrating the verdict")
        folder, left_out = Path(plan.folder), set(found.leaking)

        def files(part: str, most: int) -> Iterator[bytes]:
            names = (name for name in dataset.files[part] if name not in left_out)
            return readable((folder / name for name in islice(names, most)), step)

        made = calibrate_bundle(
            exported,
            bundle,
            files("select", MAX_FITTED),
            files("calibrate", MAX_CALIBRATING),
            dataset.name,
            step,
            encoder,
            sees_originals=encoder is None,
        )
        assert made.exact is not None
        step(
            f"calibrated on {len(made.exact.scores)} images: false-alarm rates of "
            f"{made.exact.smallest_p_value:.2g} or more are possible"
        )
    return bundle


def _export(
    plan: Plan, found: Survey, dataset: Dataset, checkpoint: Path, exported: Path, step: Report
) -> None:
    tested = dataset.parts["test"].take(rows_of(dataset, found, "test")[:MEASURED_IMAGES])
    measured = dataclasses.replace(dataset, parts={**dataset.parts, "test": tested})
    measurer = Measurer(measured, torch.device("cpu"), "test", report=step)
    result = measurer.measure(load_model(checkpoint), read_config(checkpoint))
    step(f"exporting, {result['figures']['bpd']['value']:.3f} bits per dimension")
    export_bundle(
        checkpoint,
        exported,
        plan.name,
        parity_images(dataset),
        {"test": result},
        licence=plan.licence,
        dataset=dataset,
    )
