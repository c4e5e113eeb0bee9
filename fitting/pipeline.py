"""The steps of a fitting: read, train, measure, export, calibrate and report.

A finished step is not repeated when a fitting is resumed. The output folder holds the plan
(``plan.json``), the survey of the images (``survey.json``), the training runs (``stage-N``), the
bundle before and after its calibration (``exported`` and ``bundle``) and the report
(``report.html``).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ade_model.checkpoint import load_model
from export.verdict.calibrate import calibrate_bundle
from export.verdict.corruptions import CORRUPTIONS, SUBTLE
from export.write import export_bundle
from fitting.plan import Plan, PlanError
from fitting.report import ALPHAS, Caught, Findings, Outlier, false_alarms, write_report
from fitting.survey import Survey, as_dict, picture_sizes, summary_lines, survey
from serving.bulk import BulkOptions, FileScorer
from serving.engine.bundle import open_bundle
from serving.engine.engine import InferenceEngine, Score
from training.data import CHANNELS, DataError, Dataset
from training.datasets.files import contents, shuffled
from training.datasets.folder import load_files
from training.evaluate import evaluate
from training.loop import RunOptions, train
from training.recipes import recipe
from training.runs import alone_in, latest_checkpoint, write_json

PARITY_IMAGES = 40
MEASURED_IMAGES = 1000
DRAWS, BOUND_IMAGES = 4, 200  # of the importance-weighted bound
TEST_IMAGES = 2000
SCANNED_IMAGES = 4000  # training images, among which outliers are looked for
SHOWN_OUTLIERS = 24
SAMPLES = 64
RECONSTRUCTED = 12
CORRUPTED_IMAGES = 200  # for each kind of corruption
MIN_IMAGES = {"select": 20, "calibrate": 20, "test": 2}
ENOUGH = 800  # images, of which a twenty-fifth is the part select
NO_LIMIT = 10**12

Report = Callable[[str], None]


@dataclass(frozen=True)
class Fitted:
    """Paths of the results."""

    bundle: Path
    report: Path


def fit_folder(plan: Plan, files: list[Path], out: Path, say: Report) -> Fitted:
    """Do the steps of a plan that are not finished yet.

    Args:
        plan: as :func:`fitting.plan.make_plan` makes it.
        files: the images of the plan's folder, as :func:`training.datasets.folder.image_files`
            finds them.
        out: the output folder.
        say: called with each line of progress.

    Raises:
        PlanError: the output folder was begun with another plan.
        DataError: the images are too few, or cannot be used.
        RunError: another process works in the output folder.
        ConfigError: the image size does not suit the networks.
    """
    for stage in plan.stages:  # raises for a wrong image size before anything is written
        recipe(stage.recipe, plan.image_size, CHANNELS, plan.size)
    with alone_in(out):
        return _fit(plan, files, out, say)


def _fit(plan: Plan, files: list[Path], out: Path, say: Report) -> Fitted:
    started = time.monotonic()
    _keep_plan(plan, out)

    def step(text: str) -> None:
        say(f"[{(time.monotonic() - started) / 60:5.1f} of {plan.budget:g} min] {text}")

    folder = Path(plan.folder)
    step(f"reading {folder}")
    dataset = load_files(folder, files, plan.image_size, out / "cache", lambda line: None)
    found = _survey(folder, files, dataset, out)
    for line in summary_lines(found):
        step(line)
    run = _train(plan, dataset, out, step)
    checkpoint = latest_checkpoint(run)
    bundle = _bundle(plan, found, dataset, checkpoint, out, step)
    if not (out / "report.html").exists():
        step("looking for outliers among the images")
        _report(plan, found, dataset, bundle, out)
    step("done")
    return Fitted(bundle, out / "report.html")


def has_begun(out: Path) -> bool:
    """Whether training was begun: from then on neither the plan nor the images may change."""
    return (out / "plan.json").exists() and (out / "stage-0" / "run.json").exists()


def _keep_plan(plan: Plan, out: Path) -> None:
    path = out / "plan.json"
    if has_begun(out):
        try:
            plan.check_resumes(Plan.from_dict(json.loads(path.read_text())))
        except PlanError as error:
            raise PlanError(f"{out}: {error}, or choose another output folder") from None
    write_json(path, plan.to_dict())


def _survey(folder: Path, files: list[Path], dataset: Dataset, out: Path) -> Survey:
    found = survey(picture_sizes(files), dataset)
    for part, least in MIN_IMAGES.items():
        if found.parts[part] < least:
            raise DataError(
                f"{folder}: about {ENOUGH} different images are needed, got {found.files}; "
                f"the part {part} needs at least {least} of them and gets {found.parts[part]}"
            )
    path = out / "survey.json"
    if path.exists() and has_begun(out) and json.loads(path.read_text()) != as_dict(found):
        raise PlanError(f"{folder} has changed since {out} was begun: choose another output folder")
    write_json(path, as_dict(found))
    return found


def _train(plan: Plan, dataset: Dataset, out: Path, step: Report) -> Path:
    """Train all stages; returns the last stage's run."""
    before: Path | None = None
    for number, stage in enumerate(plan.stages):
        run = out / f"stage-{number}"
        if not (run / "report.md").exists():
            step(f"training {stage.recipe}, {stage.minutes:.0f} minutes")
            config = recipe(stage.recipe, dataset.image_size, dataset.channels, plan.size)
            options = RunOptions(
                images=NO_LIMIT,
                minutes=stage.minutes,
                device=plan.device,
                checkpoint_minutes=2.0,
                init=None if before is None else str(before),
            )
            with alone_in(run):
                train(config, dataset, run, options, resume=(run / "run.json").exists())
        before = run
    assert before is not None
    return before


def _bundle(
    plan: Plan, found: Survey, dataset: Dataset, checkpoint: Path, out: Path, step: Report
) -> Path:
    """Measure, export and calibrate; returns the bundle."""
    exported, bundle = out / "exported", out / "bundle"
    if not exported.exists():
        step("measuring the likelihood of held-out images")
        tested = _test_images(dataset, found)[:MEASURED_IMAGES]
        evaluation = {
            "data": dataset.name,
            "part": "test",
            "split": dataset.splits["test"],
            "images": len(tested),
            "seed": 0,
            **evaluate(load_model(checkpoint), tested, torch.device("cpu"), DRAWS, 0, BOUND_IMAGES),
        }
        step(f"exporting, {evaluation['elbo']['bpd']:.3f} bits per dimension")
        images = np.concatenate(
            [dataset.parts[part].images[:PARITY_IMAGES] for part in ("select", "train")]
        )
        export_bundle(
            checkpoint,
            exported,
            plan.name,
            images[:PARITY_IMAGES],
            evaluation,
            licence=plan.licence,
        )
    if not bundle.exists():
        step("calibrating the verdict")
        folder, left_out = Path(plan.folder), set(found.leaking)

        def files(part: str) -> Iterator[bytes]:
            read = contents(folder / name for name in dataset.files[part] if name not in left_out)
            return (content for content in read if isinstance(content, bytes))

        made = calibrate_bundle(exported, bundle, files("select"), files("calibrate"), dataset.name)
        assert made.exact is not None
        step(
            f"calibrated on {len(made.exact.scores)} images: false-alarm rates of "
            f"{made.exact.smallest_p_value:.2g} or more are possible"
        )
    return bundle


def _test_images(dataset: Dataset, found: Survey) -> np.ndarray:
    """Test images that are not copies of others, shuffled: uint8 ``(N, H, W, C)``."""
    left_out = set(found.leaking)
    rows = shuffled([row for row, name in enumerate(dataset.files["test"]) if name not in left_out])
    return np.asarray(dataset.parts["test"].images[rows])


def _caught(engine: InferenceEngine, pixels: np.ndarray) -> list[Caught]:
    """Shares of corrupted held-out images that the verdict rejects."""
    found = []
    for name, corrupt in {**CORRUPTIONS, **SUBTLE}.items():
        scores = engine.score(corrupt(pixels, np.random.default_rng(0)))
        # A score that is not finite has no verdict: the image is neither accepted nor rejected.
        p_values = [
            score.verdict.p_value if isinstance(score, Score) and score.verdict else 1.0
            for score in scores
        ]
        rejected = tuple(float(np.mean(np.array(p_values) <= alpha)) for alpha in ALPHAS)
        found.append(Caught(name, name in CORRUPTIONS, rejected))
    return found


def _report(plan: Plan, found: Survey, dataset: Dataset, bundle: Path, out: Path) -> None:
    opened = open_bundle(bundle)
    engine = InferenceEngine(opened, device="cpu")
    scorer = FileScorer(opened, Path(plan.folder), BulkOptions(resize="fit"))
    left_out = set(found.leaking)
    tested = shuffled([name for name in dataset.files["test"] if name not in left_out])[
        :TEST_IMAGES
    ]
    p_values = [row["p_value"] for row in scorer(tested) if row.get("p_value") is not None]
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
    pixels = _test_images(dataset, found)[:CORRUPTED_IMAGES]
    held_out = pixels[:RECONSTRUCTED]
    findings = Findings(
        plan,
        found,
        opened,
        engine.sample([0] * SAMPLES, range(SAMPLES)),
        held_out,
        engine.reconstruct(held_out),
        len(p_values),
        false_alarms(p_values, opened),
        len(scanned),
        outliers,
        len(pixels),
        _caught(engine, pixels),
    )
    write_report(findings, out / "report.html")
