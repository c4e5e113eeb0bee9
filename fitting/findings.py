"""Measures a finished fit on held-out images, for its report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from operator import itemgetter
from pathlib import Path

import numpy as np

from ade_base.files import read_file
from ade_base.system import available_cores
from export.gate.corruptions import CORRUPTIONS
from export.gate.images import digests_of, others
from export.gate.rejection import corruptions_of, rejected
from fitting.encoder import ENCODER_ABOUT, recognised_share
from fitting.held_out import held_out_images, rows_of
from fitting.plan import Plan
from fitting.report import (
    ALPHAS,
    DEFAULT_ALPHA,
    Caught,
    EncoderFindings,
    Findings,
    Outlier,
    false_alarms,
    write_report,
)
from fitting.survey import Survey, size_of
from serving.api.regions import outlined_view, regions_of
from serving.engine.bundle import open_bundle
from serving.engine.engine import InferenceEngine, Score
from serving.ingest.picture import Picture, prepare_source
from serving.verdict.semantic import LOGITS
from training.data import Dataset
from training.datasets.files import shuffled
from training.runs import read_json

TEST_IMAGES = 2000
SCANNED_IMAGES = 4000  # training images, among which outliers are looked for
SHOWN_OUTLIERS = 24
CHUNK = 256  # images that are scored together
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
    folder = Path(plan.folder)
    p_values: dict[bool, list[float]] = {False: [], True: []}
    tested = _tested(dataset, rows_of(dataset, found, "test"), digests_of(engine.calibrations))
    for _, is_resized, score in _scores(engine, dataset, "test", tested, folder):
        if score.verdict is not None:
            p_values[is_resized].append(score.verdict.p_value)
    scanned = shuffled(range(len(dataset.files["train"])))[:SCANNED_IMAGES]
    judged = [
        (-score.verdict.ood_score, row, score)
        for row, _, score in _scores(engine, dataset, "train", scanned, folder)
        if score.verdict is not None
    ]
    unusual = sorted(judged, key=itemgetter(0))[:SHOWN_OUTLIERS]
    seen = dict(_pictures(engine, dataset, "train", [row for _, row, _ in unusual], folder))
    names = dataset.files["train"]
    outliers = [
        Outlier(names[row], score.verdict.p_value, score.bpd, _shown(seen[row], score))
        for _, row, score in unusual
        if row in seen and score.verdict is not None
    ]
    held_out = held_out_images(dataset, found, RECONSTRUCTED)
    to_corrupt = rows_of(dataset, found, "test")[:CORRUPTED_IMAGES]
    read = _pictures(engine, dataset, "test", to_corrupt, folder)
    pictures = [picture for _, picture in read]
    findings = Findings(
        plan=plan,
        survey=found,
        bundle=opened,
        samples=engine.sample([0] * SAMPLES, range(SAMPLES)),
        held_out=held_out,
        rebuilt=engine.reconstruct(held_out),
        alarms=false_alarms(p_values, engine.calibrations),
        scanned=len(scanned),
        outliers=outliers,
        corrupted=len(pictures),
        caught=_caught(engine, pictures),
        encoder=_encoder_findings(engine, dataset, found, out),
    )
    write_report(findings, out / "report.html")


def _tested(dataset: Dataset, rows: Sequence[int], known: set[int]) -> list[int]:
    """The first rows of test images that are not copies of those that made a calibration."""
    pixels = dataset.parts["test"].images
    images = ((str(row), Picture(pixels[row], [])) for row in rows)
    unknown = others("test", images, known, lambda line: None)
    return [int(row) for row, _ in islice(unknown, TEST_IMAGES)]


def _scores(
    engine: InferenceEngine, dataset: Dataset, part: str, rows: Sequence[int], folder: Path
) -> Iterator[tuple[int, bool, Score]]:
    """The rows of a part, whether they were resized, and their scores if these are finite."""
    found = _pictures(engine, dataset, part, rows, folder)
    while chunk := list(islice(found, CHUNK)):
        pictures = [picture for _, picture in chunk]
        scores = engine.score(
            np.stack([picture.pixels for picture in pictures]),
            resized=[picture.resized for picture in pictures],
            views=[picture.view for picture in pictures],
        )
        for (row, picture), score in zip(chunk, scores, strict=True):
            if isinstance(score, Score):
                yield row, picture.resized, score


def _pictures(
    engine: InferenceEngine, dataset: Dataset, part: str, rows: Sequence[int], folder: Path
) -> Iterator[tuple[int, Picture]]:
    """The rows of a part whose files can still be read, and their pictures.

    The data set has the pixels at the model's size: decoding thousands of photographs again would
    take longer than scoring them. Only an encoder needs the originals.
    """
    height, width, _ = engine.image_shape
    names, images = dataset.files[part], dataset.parts[part].images
    look_of = engine.calibrations.look_of

    def picture(row: int) -> Picture | None:
        path = folder / names[row]
        size = size_of(path)
        if size is None:  # lost since it was read
            return None
        resized = size != (width, height)
        if not resized or not look_of(resized).size:
            return Picture(np.asarray(images[row]), [], resized)
        made = prepare_source(partial(read_file, path), engine.image_shape, True, look_of)
        return made if isinstance(made, Picture) else None

    with ThreadPoolExecutor(available_cores()) as pool:
        for first in range(0, len(rows), CHUNK):
            chunk = rows[first : first + CHUNK]
            for row, found in zip(chunk, pool.map(picture, chunk), strict=True):
                if found is not None:
                    yield row, found


def _shown(picture: Picture, score: Score) -> np.ndarray:
    """The picture with its unusual parts outlined, or its pixels at the model's size."""
    if picture.view is None or score.verdict is None or score.verdict.patches is None:
        return picture.pixels
    regions = regions_of(score.verdict.patches, picture.view)
    return outlined_view(picture.view, regions, DEFAULT_ALPHA)


def _encoder_findings(
    engine: InferenceEngine, dataset: Dataset, found: Survey, out: Path
) -> EncoderFindings | None:
    """What became of the encoder, and how well it recognises the classes of test images.

    ``None`` if it sees the originals: then it learnt nothing.
    """
    if not (out / ENCODER_ABOUT).exists():
        return None
    about = read_json(out / ENCODER_ABOUT, "classes")
    if not about["classes"]:
        return EncoderFindings(**about)
    rows = rows_of(dataset, found, "test")[:TEST_IMAGES]
    logits = engine.features(np.asarray(dataset.parts["test"].images[rows]))[LOGITS]
    recognised, guessed = recognised_share(logits, dataset, "test", rows)
    return EncoderFindings(**about, recognised=recognised, guessed=guessed)


def _caught(engine: InferenceEngine, images: Sequence[Picture]) -> list[Caught]:
    """Shares of corrupted held-out images that the verdict rejects."""
    return [
        Caught(
            name,
            name in CORRUPTIONS,
            tuple(rejected(engine, engine.calibrations, its, ALPHAS)),
        )
        for name, its in corruptions_of(images)
    ]
