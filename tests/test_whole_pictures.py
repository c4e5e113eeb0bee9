"""Pictures of which an encoder sees the originals, in every verb that scores them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ade_base.pictures.show import write_png
from ade_cli.main import main
from export.gate.corruptions import CORRUPTIONS
from extensions.gate_reports.what_if import what_if
from fitting.findings import _caught, _pictures, _scores
from serving.engine.engine import InferenceEngine, Score
from serving.ingest.picture import Picture, prepare_image
from training.data import Dataset, ImageSet


@pytest.fixture(scope="module")
def seeing(seeing_bundle: Path) -> InferenceEngine:
    return InferenceEngine(seeing_bundle, device="cpu", operations=["score"])


@pytest.fixture(scope="module")
def folder(large_images: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of such pictures that calibrated nothing."""
    folder = tmp_path_factory.mktemp("large")
    for number, image in enumerate(large_images[60:84]):
        (folder / f"{number:03}.png").write_bytes(write_png(image))
    return folder


def prepared(engine: InferenceEngine, image: np.ndarray) -> Picture:
    made = prepare_image(image, engine.image_shape, True, engine.calibrations.look_of)
    assert isinstance(made, Picture) and made.view is not None
    return made


def scores_of(engine: InferenceEngine, pictures: list[Picture]) -> list[float]:
    found = engine.score(
        np.stack([its.pixels for its in pictures]),
        resized=[its.resized for its in pictures],
        views=[its.view for its in pictures],
    )
    return [s.verdict.ood_score for s in found if isinstance(s, Score) and s.verdict]


def test_a_fit_judges_the_originals(
    seeing: InferenceEngine, folder: Path, large_images: np.ndarray
) -> None:
    pictures = [prepared(seeing, image) for image in large_images[60:84]]
    pixels = np.stack([its.pixels for its in pictures])
    files = [f"{number:03}.png" for number in range(24)]
    dataset = Dataset("d", {"test": ImageSet(pixels)}, {}, files={"test": [*files, "lost.png"]})
    found = list(_scores(seeing, dataset, "test", [3, 24, 5], folder))
    assert [(row, is_resized) for row, is_resized, _ in found] == [(3, True), (5, True)]
    mine = [score.verdict.ood_score for _, _, score in found if score.verdict]
    assert mine == scores_of(seeing, [pictures[3], pictures[5]])
    read = [its for _, its in _pictures(seeing, dataset, "test", range(20), folder)]
    shares = {its.corruption: its.rejected for its in _caught(seeing, read)}
    assert (shares["uniform noise"][0] or 0) >= 0.9


def test_reports_judge_the_originals(
    seeing: InferenceEngine,
    folder: Path,
    large_images: np.ndarray,
    small_images: np.ndarray,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also among images of the model's size, for which the encoder has another memory."""
    (folder / "small.png").write_bytes(write_png(small_images[299]))
    words = ["ood-bench", str(seeing.bundle.folder), "--id", str(folder)]
    assert main([*words, "--corrupt", "5", "--out", str(tmp_path / "out")]) == 0
    (folder / "small.png").unlink()
    report = (tmp_path / "out" / "report.md").read_text()
    assert "without those of `features.onnx` and `encoder.onnx`" in report
    assert all(name in report for name in CORRUPTIONS)
    history = list(large_images[60:84])
    unlike = {"dark": [image // 4 for image in history[:5]], "small": list(small_images[:5])}
    found = what_if(seeing, seeing.calibrations, history, unlike, 100, 5)
    assert found.unusable == 0 and found.caught["dark"][0] is not None
    assert found.ways[0].resized and found.ways[0].calibrated == 36
