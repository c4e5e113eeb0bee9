"""Pictures of which an encoder sees the originals, in every verb that scores them."""

import numpy as np
import pytest

from ade_base.pictures.show import write_png
from fitting.findings import _caught, _pictures, _scores, _shown
from serving.engine.engine import InferenceEngine, Score
from serving.ingest.picture import Picture, prepare_image
from training.data import Dataset, ImageSet


@pytest.fixture(scope="module")
def seeing(seeing_bundle):
    return InferenceEngine(seeing_bundle, device="cpu", operations=["score"])


def prepared(engine, image):
    made = prepare_image(image, engine.image_shape, True, engine.calibrations.look_of)
    assert isinstance(made, Picture) and made.view is not None
    return made


def scores_of(engine, pictures):
    found = engine.score(
        np.stack([its.pixels for its in pictures]),
        resized=[its.resized for its in pictures],
        views=[its.view for its in pictures],
    )
    return [s.verdict.ood_score for s in found if isinstance(s, Score) and s.verdict]


def test_a_fit_judges_the_originals(seeing, large_images, tmp_path):
    for number, image in enumerate(large_images[60:84]):
        (tmp_path / f"{number:03}.png").write_bytes(write_png(image))
    pictures = [prepared(seeing, image) for image in large_images[60:84]]
    pixels = np.stack([its.pixels for its in pictures])
    files = [f"{number:03}.png" for number in range(24)]
    dataset = Dataset("d", {"test": ImageSet(pixels)}, {}, files={"test": [*files, "lost.png"]})
    found = list(_scores(seeing, dataset, "test", [3, 24, 5], tmp_path))
    assert [(row, is_resized) for row, is_resized, _ in found] == [(3, True), (5, True)]
    mine = [score.verdict.ood_score for _, _, score in found if score.verdict]
    assert mine == scores_of(seeing, [pictures[3], pictures[5]])
    for image, (_, _, score) in zip([pictures[3], pictures[5]], found, strict=True):
        assert image.view is not None
        shown, box = _shown(image, score), image.view.box
        assert shown.shape == (*box[2:], 3)  # as the encoder sees it, with outlines
    read = [its for _, its in _pictures(seeing, dataset, "test", range(20), tmp_path)]
    shares = {its.corruption: its.rejected for its in _caught(seeing, read)}
    assert (shares["uniform noise"][0] or 0) >= 0.9
