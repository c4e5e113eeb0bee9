"""The steps of a fitting: read, train, measure, export, calibrate and report.

A finished step is not repeated when a fitting is resumed. The output folder holds the plan
(``plan.json``), the survey of the images (``survey.json``), the training runs (``stage-N``), the
verdict's encoder (``encoder.onnx``), the bundle before and after its calibration
(``exported`` and ``bundle``) and the report (``report.html``).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy import stats

from ade_model.checkpoint import load_model
from export.feature_source import FeatureSource
from export.parity import ParityError, parity_images
from export.sketch import record_of
from export.to_onnx import export_encoder
from export.verdict.calibrate import calibrate_bundle
from export.verdict.corruptions import CORRUPTIONS
from export.verdict.images import readable
from export.verdict.what_if import corruptions_of, rejected
from export.write import export_bundle
from fitting.plan import REST_MINUTES, Plan, PlanError
from fitting.report import (
    ALPHAS,
    Caught,
    EncoderFindings,
    Findings,
    Outlier,
    false_alarms,
    write_report,
)
from fitting.survey import Sizes, Survey, as_dict, size_of, summary_lines, survey
from serving.api.requests import InputImage
from serving.bulk import BulkOptions, FileScorer
from serving.engine.bundle import open_bundle
from serving.engine.engine import InferenceEngine
from serving.onnx_runtime import cpu_session
from serving.verdict.semantic import LOGITS
from training.data import CHANNELS, DataError, Dataset, ImageSet
from training.datasets.files import shuffled
from training.datasets.folder import load_files
from training.encoder import TrainedEncoder, make_encoder
from training.evaluate import evaluate
from training.labels import class_folders, class_labels, listed
from training.loop import train
from training.recipes import GUIDE_WEIGHT, recipe
from training.run_options import RunOptions
from training.runs import alone_in, latest_checkpoint, read_json, write_json
from training.small_encoder import train_small_encoder
from training.step import TrainingDiverged

MEASURED_IMAGES = 1000
DRAWS, BOUND_IMAGES = 4, 200  # of the importance-weighted bound
TEST_IMAGES = 2000
AT_A_TIME = 256  # images that the encoder recognises at a time
SCANNED_IMAGES = 4000  # training images, among which outliers are looked for
SHOWN_OUTLIERS = 24
SAMPLES = 64
RECONSTRUCTED = 12
CORRUPTED_IMAGES = 200  # for each kind of corruption
MIN_IMAGES = {"select": 20, "calibrate": 20, "test": 2}
ENOUGH = 800  # images, of which a twenty-fifth is the part select
NO_LIMIT = 10**12
GIVEN_UP = "given-up.json"  # in the run of a stage that diverged
ENCODER_NAME, ENCODER_ABOUT, GUIDE_NAME = "encoder.onnx", "encoder.json", "guide.onnx"
MAX_GUESSING = 0.01  # probability that an encoder which only guesses is used

Report = Callable[[str], None]


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
        PlanError: the output folder was begun with another plan.
        DataError: the images are too few, or cannot be used.
        RunError: another process works in the output folder.
        ConfigError: the image size does not suit the networks.
    """
    for stage in plan.stages:  # raises for a wrong image size before anything is written
        recipe(stage.recipe, plan.image_size, CHANNELS, plan.size, **plan.changes(stage))
    with alone_in(out):
        return _fit(plan, files, sizes, out, say)


def _fit(plan: Plan, files: list[Path], sizes: Sizes, out: Path, say: Report) -> Fitted:
    started = time.monotonic()
    _keep_plan(plan, out)

    def step(text: str) -> None:
        say(f"[{(time.monotonic() - started) / 60:5.1f} of {plan.budget:g} min] {text}")

    def read(line: str) -> None:
        if not line.startswith("skipped"):  # the survey lists these files
            step(line)

    if plan.rest < REST_MINUTES and not has_begun(out):
        step(
            "the steps after training take about 2 minutes: this budget leaves "
            f"{_minutes(plan.rest)} and will be exceeded"
        )
    folder = Path(plan.folder)
    step(f"reading {folder}")
    dataset = load_files(folder, files, plan.image_size, out / "cache", read)
    found = _survey(folder, files, sizes, dataset, out)
    for line in summary_lines(found):
        step(line)
    encoder = _encoder(plan, found, dataset, out, step)
    guide = _guide(plan, dataset, out, step)
    runs = _train(plan, dataset, guide, out, step)
    bundle = _bundle(plan, found, dataset, runs, encoder, out, step)
    if not (out / "report.html").exists():
        step("looking for outliers among the images")
        _report(plan, found, dataset, bundle, out)
    step("done")
    return Fitted(bundle, out / "report.html")


def _minutes(value: float) -> str:
    """Minutes for the user: two significant digits, or a whole number."""
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


def has_begun(out: Path) -> bool:
    """Whether anything was trained: from then on neither the plan nor the images may change."""
    trained = (out / "stage-0" / "run.json", out / ENCODER_ABOUT)
    return (out / "plan.json").exists() and any(path.exists() for path in trained)


def _keep_plan(plan: Plan, out: Path) -> None:
    path = out / "plan.json"
    if has_begun(out):
        try:
            plan.check_resumes(Plan.load(path))
        except PlanError as error:
            raise PlanError(f"{out}: {error}, or choose another output folder") from None
    write_json(path, plan.to_dict())


def _survey(folder: Path, files: list[Path], sizes: Sizes, dataset: Dataset, out: Path) -> Survey:
    found = survey(sizes, dataset)
    for part, least in MIN_IMAGES.items():
        if found.parts[part] < least:
            names = len({file.name for file in files})
            copies = sum(len(group) - 1 for group in found.twice)
            raise DataError(
                f"{folder}: about {ENOUGH} different images are needed, got {found.files} files "
                f"(unusable: {len(found.broken)}, copies: {copies}); "
                f"the part {part} needs at least {least} images and gets {found.parts[part]}"
                + (
                    f". Files of one name are in one part: these have {names} names"
                    if names < len(files)
                    else ""
                )
            )
    path = out / "survey.json"
    if path.exists() and has_begun(out) and read_json(path) != as_dict(found):
        raise PlanError(f"{folder} has changed since {out} was begun: choose another output folder")
    write_json(path, as_dict(found))
    return found


def _train(plan: Plan, dataset: Dataset, guide: Path | None, out: Path, step: Report) -> list[Path]:
    """Train all stages, from the second on with the guide; returns their runs, the last first.

    A later stage that diverges is given up: the model of the one before it is used.
    """
    runs: list[Path] = []
    for number, stage in enumerate(plan.stages):
        run = out / f"stage-{number}"
        before = runs[0] if runs else None
        its_guide = None if before is None else guide
        if (run / GIVEN_UP).exists():
            break
        if not (run / "report.md").exists():
            guided = "" if its_guide is None else " with the guide"
            step(f"training {stage.recipe}{guided}, {_minutes(stage.minutes)} minutes")
            config = recipe(
                stage.recipe,
                dataset.image_size,
                dataset.channels,
                plan.size,
                **plan.changes(stage),
                guide_weight=0.0 if its_guide is None else GUIDE_WEIGHT,
            )
            options = RunOptions(
                images=NO_LIMIT,
                minutes=stage.minutes,
                device=plan.device,
                checkpoint_minutes=2.0,
                init=None if before is None else str(before),
                guide=None if its_guide is None else str(its_guide),
            )
            try:
                with alone_in(run):
                    train(config, dataset, run, options, resume=(run / "run.json").exists())
            except TrainingDiverged as error:
                if not runs:
                    raise TrainingDiverged(
                        f"{error}; delete {run} to try again, perhaps with a larger budget"
                    ) from error
                step(f"{error}; the model of the stage before is used")
                write_json(run / GIVEN_UP, {"error": str(error)})
                break
        runs.insert(0, run)
    return runs


def _encoder(plan: Plan, found: Survey, dataset: Dataset, out: Path, step: Report) -> FeatureSource:
    """Make the verdict's encoder, with a classifier if the images lie in class folders.

    If it recognises the classes of held-out images no better than guessing, it does without them.
    """
    path, about_path = out / ENCODER_NAME, out / ENCODER_ABOUT
    if about_path.exists():
        return FeatureSource(path)
    images = dataset.parts["train"].images

    def write(labels: np.ndarray | None) -> TrainedEncoder:
        made = make_encoder(ImageSet(images, labels))
        record = record_of(dataset) if made.classes else None
        export_encoder(made.network, np.asarray(images[:2]), made.outputs, path, record)
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


def _guide(plan: Plan, dataset: Dataset, out: Path, step: Report) -> Path | None:
    """Train the generator's guide, if the plan has minutes for it and its classes can be learnt.

    It restarts if it was interrupted.
    """
    path = out / GUIDE_NAME
    if not plan.guide_minutes or not read_json(out / ENCODER_ABOUT, "classes")["classes"]:
        return None
    if not path.exists():
        step(f"training a guide, {_minutes(plan.guide_minutes)} minutes")
        images = ImageSet(dataset.parts["train"].images, class_labels(dataset))
        made = train_small_encoder(images, plan.guide_minutes, torch.device(plan.device))
        export_encoder(made.network, np.asarray(images.images[:2]), made.outputs, path)
    return path


def _recognises_classes(path: Path, dataset: Dataset, found: Survey) -> bool:
    """Whether an encoder recognises the classes of held-out images better than by guessing."""
    rows = _rows(dataset, found, "select")
    images = dataset.parts["select"].images
    session = cpu_session(path, torch.get_num_threads())
    parts = [rows[first : first + AT_A_TIME] for first in range(0, len(rows), AT_A_TIME)]
    logits = np.concatenate(
        [session.run([LOGITS], {"images": np.asarray(images[few])})[0] for few in parts]
    )
    recognised, guessed = _recognised(logits, dataset, "select", rows)
    test = stats.binomtest(round(recognised * len(rows)), len(rows), guessed, alternative="greater")
    return bool(test.pvalue < MAX_GUESSING)


def _recognised(
    logits: np.ndarray, dataset: Dataset, part: str, rows: list[int]
) -> tuple[float, float]:
    """Share of held-out images whose class is recognised, and that in the largest class."""
    trained, labels = class_labels(dataset), class_labels(dataset, part)
    assert trained is not None and labels is not None
    held_out = labels[rows]
    largest = np.bincount(trained).argmax()
    return float(np.mean(logits.argmax(1) == held_out)), float(np.mean(held_out == largest))


def _bundle(
    plan: Plan,
    found: Survey,
    dataset: Dataset,
    runs: list[Path],
    encoder: FeatureSource,
    out: Path,
    step: Report,
) -> Path:
    """Measure, export and calibrate; returns the bundle.

    A model whose graphs differ from it is given up for that of the stage before.
    """
    exported, bundle = out / "exported", out / "bundle"
    for run in runs:
        if exported.exists():
            break
        try:
            _export(plan, found, dataset, latest_checkpoint(run), exported, step)
        except ParityError as error:
            if run == runs[-1]:
                raise
            step(f"{error}; the model of the stage before is used")
    if not bundle.exists():
        step("calibrating the verdict")
        folder, left_out = Path(plan.folder), set(found.leaking)

        def files(part: str) -> Iterator[bytes]:
            names = (name for name in dataset.files[part] if name not in left_out)
            return readable((folder / name for name in names), step)

        made = calibrate_bundle(
            exported,
            bundle,
            files("select"),
            files("calibrate"),
            dataset.name,
            step,
            encoder,
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
    step("measuring the likelihood of held-out images")
    tested = _test_images(dataset, found, MEASURED_IMAGES)
    evaluation = {
        "data": dataset.name,
        "part": "test",
        "split": dataset.splits["test"],
        "images": len(tested),
        "seed": 0,
        **evaluate(load_model(checkpoint), tested, torch.device("cpu"), DRAWS, 0, BOUND_IMAGES),
    }
    step(f"exporting, {evaluation['elbo']['bpd']:.3f} bits per dimension")
    export_bundle(
        checkpoint,
        exported,
        plan.name,
        parity_images(dataset),
        evaluation,
        licence=plan.licence,
        dataset=dataset,
    )


def _rows(dataset: Dataset, found: Survey, part: str) -> list[int]:
    """Rows of a part's images that are not copies of others, shuffled."""
    left_out = set(found.leaking)
    return shuffled([row for row, name in enumerate(dataset.files[part]) if name not in left_out])


def _test_images(dataset: Dataset, found: Survey, most: int) -> np.ndarray:
    """Some test images that are not copies of others: uint8 ``(N, H, W, C)``."""
    return np.asarray(dataset.parts["test"].images[_rows(dataset, found, "test")[:most]])


def _encoder_findings(
    engine: InferenceEngine, dataset: Dataset, found: Survey, out: Path
) -> EncoderFindings:
    """What became of the encoder, and how well it recognises the classes of test images."""
    about = read_json(out / ENCODER_ABOUT, "classes")
    if not about["classes"]:
        return EncoderFindings(**about)
    rows = _rows(dataset, found, "test")[:TEST_IMAGES]
    logits = engine.features(np.asarray(dataset.parts["test"].images[rows]))[LOGITS]
    recognised, guessed = _recognised(logits, dataset, "test", rows)
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


def _report(plan: Plan, found: Survey, dataset: Dataset, bundle: Path, out: Path) -> None:
    opened = open_bundle(bundle)
    engine = InferenceEngine(opened, device="cpu")
    scorer = FileScorer(opened, Path(plan.folder), BulkOptions(resize="fit"))
    tested = [dataset.files["test"][row] for row in _rows(dataset, found, "test")[:TEST_IMAGES]]
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
    pixels = _test_images(dataset, found, CORRUPTED_IMAGES)
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
