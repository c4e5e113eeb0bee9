"""Regions that a calibration ignores: nothing in them changes an answer."""

from __future__ import annotations

import base64
import dataclasses
import io
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from ade_base.pictures.ignored import Ignored, MaskError
from ade_base.pictures.show import write_png
from ade_base.pictures.view import LARGE, Look
from ade_cli.main import main
from export.gate.calibrate import calibrate_bundle
from export.gate.images import NamedFile
from export.gate.rejection import corruptions_of
from serving.api.regions import regions_of
from serving.gate import Gate
from serving.ingest.errors import ApiError
from serving.ingest.picture import Picture, prepare_image
from serving.verdict.calibration import CalibrationError
from serving.verdict.calibration_file import CalibrationPair
from serving.verdict.patches import PatchMemory
from tests.in_process import answered_here

CORNER = np.s_[:24, 36:]  # of pictures of 60 x 40 pixels
KINDS = ["seen", "plain", "small"]  # by an encoder, by none, of the model's size


def mask_of(height, width, region):
    mask = np.zeros((height, width, 1), np.uint8)
    mask[region] = 255
    return write_png(mask)


def region_of(kind):
    return np.s_[2:5, 4:] if kind == "small" else CORNER


@pytest.fixture(scope="module")
def images_of(small_images, large_images):
    return lambda kind: small_images if kind == "small" else large_images


@pytest.fixture(scope="module")
def bundle_of(tiny_bundle, images_of, made_once):
    """Bundles whose calibrations ignore a region, by kind."""

    def bundle(kind):
        images = images_of(kind)

        def make(out):
            mask = Ignored.read(mask_of(*images.shape[1:3], region_of(kind)))
            calibrate_bundle(
                tiny_bundle,
                out,
                images[:24],
                images[24:60],
                kind,
                sees_originals=kind == "seen",
                ignored=mask,
            )

        return made_once(f"ignoring-{kind}", make)

    return bundle


def asked(url, *pictures, **parameters):
    files = [base64.b64encode(write_png(picture)).decode() for picture in pictures]
    body = {"images": files, "resize": "fit", "map": True, **parameters}
    return httpx.post(f"{url}/predictions/score", json=body)


@pytest.mark.parametrize("kind", KINDS)
def test_ignored_pixels_change_nothing(kind, bundle_of, images_of):
    region, pictures = region_of(kind), images_of(kind)[60:64]
    changed, other = pictures.copy(), pictures.copy()
    rng = np.random.default_rng(0)
    for i, picture in enumerate(changed):
        noise = rng.integers(0, 256, picture[region].shape)
        picture[region] = (noise, 0, 255, 255 - picture[region])[i]
    other[:, -3:] = 255 - other[:, -3:]
    bundle = bundle_of(kind)
    with answered_here({kind: bundle}) as url:
        answers = [asked(url, *its) for its in (pictures, changed, other)]
        plain, same, others = (answer.json()["results"] for answer in answers)
        assert answers[0].content == answers[1].content
        pairs = zip(plain, others, strict=True)
        assert all(its["ood_score"] != other["ood_score"] for its, other in pairs)
        if kind == "seen":
            of_pictures = [
                asked(url, its[0], format="png", map=False) for its in (pictures, changed)
            ]
            assert of_pictures[0].content == of_pictures[1].content
    gate = Gate(bundle)
    assert gate.check(list(pictures)) == gate.check(list(changed))
    assert [its["p_value"] for its in same] == [its.p_value for its in gate.check(list(changed))]


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_of_another_shape(kind, bundle_of):
    size = "8 x 8" if kind == "small" else "60 x 40"
    with answered_here({kind: bundle_of(kind)}) as url:
        answer = asked(url, np.zeros((40, 61, 3), np.uint8))
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (422, "wrong_size")
    assert size in error["message"] and error["message"].endswith("got 61 x 40")


def test_calibration_leaves_out_pictures_of_another_shape(tiny_bundle, large_images, tmp_path):
    ignored = Ignored.read(mask_of(40, 60, CORNER))
    lines: list[str] = []
    odd = NamedFile.of("odd.png", write_png(large_images[0, :, :50]))
    options: dict[str, Any] = {"sees_originals": False, "ignored": ignored}
    rest = list(large_images[24:60])
    calibrate_bundle(
        tiny_bundle, tmp_path / "a", large_images[:24], [odd, *rest], "c", lines.append, **options
    )
    (told,) = [line for line in lines if "left out" in line]
    assert told.startswith("calibration: left out 1 image: odd.png: images must be 60 x 40 pixels")
    assert told.endswith("got 50 x 40")
    narrow = list(large_images[:, :, :50])
    with pytest.raises(CalibrationError, match="must be 60 x 40 pixels.*got 50 x 40"):
        calibrate_bundle(tiny_bundle, tmp_path / "b", narrow[:24], narrow[24:60], "c", **options)
    with pytest.raises(CalibrationError, match="examples cannot be kept"):
        calibrate_bundle(
            tiny_bundle, tmp_path / "b", rest, rest, "c", keep_examples=True, **options
        )
    assert not (tmp_path / "b").exists()


def one_bit(height, width):
    out = io.BytesIO()
    Image.new("1", (width, height)).save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize(
    "mask, message",
    [
        (mask_of(40, 60, np.s_[:]), "white pixels cover the whole picture"),
        (mask_of(40, 60, np.s_[:0]), "no pixel is white"),
        (b"white", "the mask of ignored regions: "),
        (one_bit(4001, 4000), "at most 16000000 pixels, this one has 4000 x 4001"),
        # Decoded at half its size, as JPEG, a picture would have no other pixel.
        (mask_of(2049, 2048, np.s_[:2048]), "white pixels cover the whole picture"),
    ],
)
def test_masks_that_are_refused(mask, message, tiny_bundle, tmp_path, capsys):
    with pytest.raises(MaskError, match=message):
        Ignored.read(mask)
    (tmp_path / "mask.png").write_bytes(mask)
    words = ["calibrate", str(tiny_bundle), str(tmp_path / "out"), "--data", str(tmp_path)]
    assert main([*words, "--ignore", str(tmp_path / "mask.png")]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_jpeg_is_decoded_at_half_its_size(orientation):
    """What is ignored is the same, also of a file that EXIF turns; its edges are blurred."""
    size = (2100, 2049) if orientation == 1 else (2049, 2100)  # of the file
    pixels = np.random.default_rng(0).integers(0, 100, (2049, 2100, 3), np.uint8)
    pixels[600:900, 1500:] = 255
    picture, exif = Image.fromarray(pixels), Image.Exif()
    exif[0x0112] = orientation
    if orientation == 6:
        picture = picture.transpose(Image.Transpose.ROTATE_90)
    assert picture.size == size
    out = io.BytesIO()
    picture.save(out, "JPEG", exif=exif)
    ignored = Ignored.read(mask_of(2049, 2100, np.s_[584:916, 1484:]))
    look = Look(LARGE, ignored)
    made = prepare_image(out.getvalue(), (8, 8, 3), True, lambda resized: look)
    assert isinstance(made, Picture) and made.view is not None
    assert made.view.original == (2049, 2100)  # not that of the decoded pixels
    assert made.pixels.max() < 100 and made.view.pixels.max() < 100
    refused = prepare_image(write_png(pixels[1:]), (8, 8, 3), True, lambda resized: look)
    assert isinstance(refused, ApiError) and refused.code == "wrong_size"
    assert "2100 x 2049 pixels" in refused.message and "got 2100 x 2048" in refused.message


def test_a_mask_may_be_a_large_jpeg():
    png, out = mask_of(2050, 2100, np.s_[600:900, 1500:]), io.BytesIO()
    Image.open(io.BytesIO(png)).save(out, "JPEG")
    reduced, whole = Ignored.read(out.getvalue()), Ignored.read(png)
    assert reduced.size == whole.size == (2100, 2050) and reduced.width == 1050
    for shape in ((2050, 2100), (1025, 1050)):
        assert (reduced.at(*shape) == whole.at(*shape)).all()


def test_hidden_patches_are_not_marked():
    """The grid of regions stays whole: those that are ignored have p-value 1."""
    ignored = Ignored.read(mask_of(100, 200, np.s_[:50, 100:]))
    view = Look(LARGE, ignored).of(np.zeros((100, 200, 3), np.uint8))
    assert view.inside.sum() == 14 * 7 and view.seen.sum() == 14 * 7 - 4 * 7
    memory = PatchMemory(
        *(np.ones(2, np.float32),) * 2, np.ones((3, 2), np.int8), np.arange(1.0, 10)
    )
    distances = memory.distances(np.full((1, 196, 2), 99.0, np.float32), view.seen.ravel()[None])
    regions = regions_of(memory.p_values(distances)[0], view)
    assert (regions.p_values[:4, 7:] == 1).all() and regions.p_values.shape == (7, 14)
    assert (regions.p_values == 1).sum() == 4 * 7


def test_corrupted_pictures_keep_what_is_ignored(large_images):
    look = Look(LARGE, Ignored.read(mask_of(40, 60, np.s_[20:, :])))
    made = [prepare_image(its, (8, 12, 3), True, lambda resized: look) for its in large_images[:3]]
    pictures = [its for its in made if isinstance(its, Picture)]
    (changed, *_) = dict(corruptions_of(pictures, look.ignored))["uniform noise"]
    assert changed.view is not None and pictures[0].view is not None
    for its, own, edge in (
        (changed.pixels, pictures[0].pixels, 4),
        (changed.view.pixels[37:186], pictures[0].view.pixels[37:186], 75),
    ):
        assert (its[edge:] == own[edge:]).all() and (
            its[: edge - 1] != own[: edge - 1]
        ).mean() > 0.9


def test_it_is_stored_and_checked(bundle_of, tmp_path):
    path = bundle_of("plain") / "calibration.npz"
    made = CalibrationPair.load(path).exact
    assert made is not None and made.ignored is not None
    its = made.ignored
    assert its.at(40, 60)[CORNER].all() and its.share == 0.24
    assert its.size == (60, 40) and its.bits.nbytes == 40 * 8
    for change, message in (
        ({"bits": its.bits.astype(np.int8)}, "ignored must be uint8"),
        ({"bits": its.bits[:, :7]}, "ignored must be uint8"),
        ({"bits": its.bits[:9]}, "must have one of the shapes"),
        ({"bits": its.bits | 255}, "cover the whole picture"),
        ({"bits": its.bits & 0}, "no pixel is white"),
        ({"width": 57}, "must have one of the shapes"),
        ({"size": (0, 40)}, "may have at most 51000000 pixels"),
        ({"size": (10**6, 10**6)}, "may have at most 51000000 pixels"),
    ):
        wrong = dataclasses.replace(made, ignored=dataclasses.replace(its, **change))
        with pytest.raises(CalibrationError, match=message):
            wrong.check_values()
        damaged = tmp_path / "damaged.npz"
        damaged.write_bytes(CalibrationPair(wrong, wrong).to_bytes())
        with pytest.raises(CalibrationError, match=message):
            CalibrationPair.load(damaged)
