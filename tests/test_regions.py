"""Regions: where a picture is unusual, and the promise on how often a good one gets a mark."""

import base64
import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image

from ade_base.brand import percent
from ade_base.pictures.show import write_png
from ade_base.pictures.view import LARGE, STRIDE, Look
from ade_client.contract import ScoreAnswer
from ade_client.model import from_json
from ade_client.outlines import outlined
from export.gate.calibrate import calibrate_bundle
from serving.api.operations.registry import OPERATIONS
from serving.api.regions import regions_of
from serving.api.service import Service
from serving.engine.engine import InferenceEngine
from serving.ingest.requests import FilesRequest, RawRequest, decode_images
from serving.page.tab_score import NOT_OUTLINED, OUTLINED, original_of, outlined_original
from serving.page.verdict import Scored
from serving.verdict.patches import PatchMemory
from tests.test_operations import RESULT

SIZE = 96, 64  # width, height of the larger pictures


def large(image, seed):
    """An image, enlarged with noise, uint8 ``(64, 96, 3)``."""
    enlarged = np.asarray(Image.fromarray(image).resize(SIZE, Image.Resampling.BICUBIC))
    noise = np.random.default_rng(seed).normal(0, 4, enlarged.shape)
    return np.clip(enlarged + noise, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def engine(tiny_bundle, small_images, made_once):
    """Calibrated on larger pictures."""
    pictures = [write_png(large(image, i)) for i, image in enumerate(small_images[:110])]

    def make(out):
        calibrate_bundle(tiny_bundle, out, pictures[:40], pictures[40:], "large")

    return InferenceEngine(made_once("large", make), device="cpu", operations=["score"])


def asked(*pictures, **parameters):
    files = [base64.b64encode(write_png(picture)).decode() for picture in pictures]
    body = {"images": files, "resize": "fit", **parameters}
    return RawRequest("application/json", json.dumps(body).encode())


def of_one(p_value, height, width):
    """The regions of a grey picture of which one part is unusual, and the number of that part."""
    view = Look().of(np.full((height, width, 1), 90, np.uint8))
    p_values = np.ones(view.inside.size, np.float32)
    inside = np.flatnonzero(view.inside.ravel())
    p_values[inside[len(inside) // 2]] = p_value
    return regions_of(p_values, view), tuple(np.argwhere(view.inside)[len(inside) // 2])


@pytest.mark.parametrize("images", [19, 99, 150])
def test_at_most_a_share_alpha_of_good_pictures_gets_any_mark(images):
    """Of distances that are not alike within a picture, in many draws of the calibration."""
    rng, p = np.random.default_rng(images), np.ones(1, np.float32)
    marked = {0.01: 0.0, 0.05: 0.0, 0.2: 0.0}
    view = Look().of(np.zeros((100, 150, 3), np.uint8))
    draws, tested = 300, 40
    for _ in range(draws):
        sharpness = rng.gamma(3, size=(images + tested, 1))
        distances = (sharpness * rng.gamma(2, size=(images + tested, view.inside.size))).round(1)
        distances = np.where(view.inside.ravel(), distances, 0).astype(np.float32)
        memory = PatchMemory(p, p, p[None].astype(np.int8), np.sort(distances[:images].max(1)))
        for its in memory.p_values(distances[images:]):
            regions = regions_of(its, view)
            for alpha in marked:
                marked[alpha] += (regions.p_values <= alpha).any() / draws / tested
    for alpha, share in marked.items():
        # The draws of the calibration vary, too: Beta(alpha n, …) has about this variance.
        error = np.sqrt(alpha * (1 - alpha) * (1 / images + 1 / tested) / draws)
        assert share <= alpha + 4 * error, (alpha, share)
        rank = np.floor(alpha * (images + 1) + 1e-9) / (images + 1)
        assert share >= rank - 4 * error - 0.02, (alpha, share)  # ties take some


@pytest.mark.parametrize("height, width", [(290, 120), (64, 96), (32, 32), (3000, 40), (7, 2000)])
def test_an_outline_is_around_its_part_of_the_original(height, width):
    regions, (row, column) = of_one(0.05, height, width)
    assert (regions.image_height, regions.image_width) == (height, width)
    picture = np.full((height, width, 3), 90, np.uint8)
    drawn = outlined(picture, regions, 0.05)
    scale = drawn.shape[0] / height
    changed = np.argwhere((drawn != 90).any(2))
    side = STRIDE / LARGE * max(drawn.shape)  # of a cell of the view, which is a square
    view_top, view_left, _, _ = Look().of(picture).box
    for axis, (cell, start) in enumerate([(row, view_top), (column, view_left)]):
        low = (cell * STRIDE - start) / LARGE * max(height, width) * scale
        # Views have whole pixels, and thin pictures lie within a part of a cell.
        most = drawn.shape[axis] - 1
        slack = 2 + 0.01 * max(drawn.shape)
        assert abs(changed[:, axis].min() - max(0, low)) <= slack
        assert abs(changed[:, axis].max() - min(most, low + side)) <= slack
    assert np.array_equal(outlined(picture, regions, 0.049) == 90, np.ones_like(drawn, bool))


@pytest.mark.parametrize(
    "p_value, written", [(1 / 20, 0.05), (1 / 100, 0.01), (1 / 651, 0.0016), (1 / 30_001, 0.0001)]
)
def test_p_values_are_rounded_up(p_value, written):
    """A mark at alpha must have at most alpha, and 0.05 in float32 is more than 0.05."""
    assert of_one(p_value, 64, 96)[0].p_values.min() == written


def test_regions_of_larger_pictures(engine, small_images):
    good = [large(image, 1000 + i) for i, image in enumerate(small_images[110:190])]
    bad = np.array(good[0])
    bad[32:48, 60:76] = np.random.default_rng(0).integers(0, 256, (16, 16, 3))
    service = Service("score", engine)
    (answer,) = service.answer([asked(*good, bad, map=True)])
    assert answer.status == 200
    results = from_json(ScoreAnswer, json.loads(answer.body)).results
    found = [result.regions for result in results]
    assert all(its.p_values.shape == (10, 14) for its in found)
    assert (found[0].image_width, found[0].image_height) == SIZE
    share = np.mean([(its.p_values <= 0.1).any() for its in found[:-1]])
    assert share <= 0.1 + 4 * np.sqrt(0.09 * (1 / 70 + 1 / 80))
    unusual = np.argwhere(found[-1].p_values <= 0.02)
    assert len(unusual)  # in the damaged part, or beside it: patches are averaged over 3 x 3
    places = (unusual + 0.5) * [found[-1].height / 10, found[-1].width / 14]
    places += [found[-1].top, found[-1].left]
    assert (np.abs(places - [40, 68]) <= 8 + 2 * 96 / 14).all()
    (alone,) = service.answer([asked(bad, map=True)])  # not of its batch
    assert (
        json.loads(alone.body)["results"][0]["regions"]
        == (json.loads(answer.body)["results"][-1]["regions"])
    )
    (without,) = service.answer([asked(bad)])
    assert "regions" not in json.loads(without.body)["results"][0]


def test_a_picture_of_them(engine, small_images):
    bad = np.array(large(small_images[0], 0))
    bad[32:48, 60:76] = np.random.default_rng(0).integers(0, 256, (16, 16, 3))
    service = Service("score", engine)
    marked, plain = service.answer([asked(bad, format="png", alpha=a) for a in (0.05, 0.001)])
    assert marked.content_type == plain.content_type == "image/png"
    outline, seen = (
        np.asarray(Image.open(io.BytesIO(its.body))).astype(int) for its in (marked, plain)
    )
    assert seen.shape == outline.shape == (149, 224, 3)
    assert np.abs(seen - np.asarray(Image.fromarray(bad).resize((224, 149), 2))).max() <= 1
    changed = np.argwhere((outline != seen).any(2))
    assert len(changed) and (np.abs(changed.mean(0) - [93, 158]) < 25).all()


@pytest.mark.parametrize(
    "of, pictures, code", [("large", 2, "too_many_images"), ("tiny", 1, "no_regions")]
)
def test_no_picture(engine, tiny_bundle, small_images, of, pictures, code):
    own = engine if of == "large" else InferenceEngine(tiny_bundle, operations=["score"])
    images = [large(image, i) for i, image in enumerate(small_images[:pictures])]
    (answer,) = Service("score", own).answer([asked(*images, format="png")])
    assert (answer.status, json.loads(answer.body)["error"]["code"]) == (422, code)


def test_the_page_outlines_the_original(tmp_path, monkeypatch):
    """A large original is shown at most 1024 pixels per side, and outlined again at each alpha."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    regions, _ = of_one(0.05, 1500, 2000)
    data = write_png(np.full((1500, 2000, 3), 90, np.uint8))
    scored = Scored(dataclasses.replace(RESULT, map=None, regions=regions), True, original_of(data))
    for alpha, said in ((0.05, OUTLINED), (0.04, NOT_OUTLINED), (0.2, OUTLINED)):
        image, words = outlined_original(scored, alpha)
        shown = np.asarray(Image.open(image.value["path"]))
        assert shown.shape == (768, 1024, 3) and (shown != 90).any() == (said == OUTLINED)
        assert said in words and percent(alpha) in words
    skipped = outlined_original(Scored(RESULT, True), 0.05)
    assert [type(it) for it in skipped] == [dict, dict]  # Gradio's "leave it as it is"


@pytest.mark.parametrize("parameters", [{"map": True}, {"format": "png"}])
def test_the_longest_answer_is_known_before(engine, small_images, parameters):
    noise = np.random.default_rng(1).integers(0, 256, (300, 300, 3), np.uint8)
    (answer,) = Service("score", engine).answer([asked(noise, **parameters)])
    parsed = OPERATIONS["score"].parse(asked(noise, **parameters), engine.bundle)
    assert isinstance(parsed, FilesRequest)
    looks = lambda its: OPERATIONS["score"].look_of(its, engine)
    (decoded,) = decode_images([parsed], engine.image_shape, map, looks)
    assert len(answer.body) <= OPERATIONS["score"].answer_bytes(decoded, engine.bundle)
