"""The gate in a process of one's own: a decision for whatever an image is."""

import dataclasses
import io
import os
import struct
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from ade_base.pictures.read import read_image
from ade_client.client import image_file
from serving.engine.bundle import BundleError
from serving.gate import Gate
from tests.helpers import PRETRAINED, ROOT, png_with_key

NOISE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
CAT = ROOT / "serving" / "examples" / "cat.png"


def test_decisions_on_whatever_an_image_is(gate):
    pixels = np.asarray(Image.open(CAT).convert("RGB"))
    expected = gate.check(CAT)
    assert (
        [d.decision for d in expected] == ["accept"]
        and expected[0].accepted
        and expected[0].p_value > 0.1
    )
    for same in (
        str(CAT),
        CAT.read_bytes(),
        Image.open(CAT),
        pixels,
        [CAT],
        pixels[None],
        (pixels,),
        bytearray(CAT.read_bytes()),
    ):
        assert gate.check(same) == expected
    for wrong in (None, [None], io.BytesIO(CAT.read_bytes()), (path for path in [CAT])):
        with pytest.raises(TypeError, match="an image must be a path, .*; got"):
            gate.check(wrong)
    for array in (pixels[:, :, 0], pixels[None, None]):
        with pytest.raises(ValueError, match=r"must be uint8 \(H, W, C\)"):
            gate.check(array)
        with pytest.raises(ValueError, match=r"must be uint8 \(H, W, C\)"):
            gate.check([array])
    larger = NOISE.repeat(3, 0).repeat(3, 1)
    found = gate.check([CAT, b"no image", NOISE, ROOT / "nowhere.png", larger])
    assert [d.decision for d in found] == ["accept", "no_verdict", "reject", "no_verdict", "reject"]
    assert [d.accepted for d in found] == [True, False, False, False, False]
    assert [d.is_error for d in found] == [False, True, False, True, False]
    assert found[1].reason.startswith("not_scored: not an image") and found[3].reason.startswith(
        "not_scored: No such file"
    )
    assert found[0] == expected[0] and gate.check([]) == []
    with pytest.raises(ValueError, match="uint8"):
        gate.check(NOISE.astype(np.float32))


def test_the_first_picture_of_the_readme(gate):
    """As its caption says; by the likelihood alone, the rejected images would pass."""
    pictures = pytest.importorskip("benchmarks.pictures")
    found = gate.check([pixels for _, pixels in pictures.gate_images()])
    assert [d.decision for d in found] == ["accept"] * 3 + ["reject"] * 3
    assert max(d.bpd for d in found[3:]) < min(d.bpd for d in found[:3])


def test_pixels_that_png_cannot_hold(gate):
    """Of a mode that it lacks, without pixels, or of more bytes than a file may have."""
    cmyk = Image.open(CAT).convert("RGB").convert("CMYK")
    noise = np.random.default_rng(0).integers(0, 256, (2400, 2400, 3), np.uint8)
    found = gate.check([cmyk, Image.new("RGB", (0, 3)), NOISE[:0], noise, Image.fromarray(noise)])
    assert [d.is_error for d in found] == [False, True, True, False, False]
    assert found[4].bpd == found[3].bpd
    vast = Image.fromarray(np.random.default_rng(0).integers(0, 256, (4001, 4000, 3), np.uint8))
    (refused,) = gate.check([vast])
    assert refused.is_error and "may have at most" in str(refused.reason)
    assert "must have pixels, got 0 x 3" in str(found[1].reason)


def test_paths_that_are_not_image_files(gate, tmp_path):
    """Neither waits for a writer nor reads more than an image file may have."""
    os.mkfifo(pipe := tmp_path / "pipe.png")
    with open(large := tmp_path / "large.png", "wb") as file:
        file.truncate(2**40)
    found = gate.check([pipe, large, tmp_path])
    assert [d.decision for d in found] == ["no_verdict"] * 3
    for decision, reason in zip(found, ("regular file", "may have", "regular file"), strict=True):
        assert reason in str(decision.reason)


@pytest.mark.parametrize("mode", ["I;16B", "PA", "La", "RGBa"])
def test_an_opened_image_is_judged_as_its_file(gate, tmp_path, mode):
    """Values above 8 bits, and alpha, which Pillow's RGB drops."""
    grey = np.asarray(Image.open(CAT).convert("L"))
    if mode == "I;16B":
        Image.frombytes(mode, grey.shape[::-1], (grey.astype(">u2") * 257).tobytes()).save(
            file := tmp_path / "x.tif"
        )
        assert gate.check(Image.open(file)) == gate.check(file)
        return
    base = {"PA": "P", "La": "LA", "RGBa": "RGBA"}[mode]
    image = Image.fromarray(grey).convert("RGBA" if mode == "RGBa" else "L").convert(base)
    image = image.convert("PA") if mode == "PA" else image
    image.putalpha(Image.new("L", image.size, 0))
    white = np.full((32, 32, 3), 255, np.uint8)
    (decision,) = gate.check(image.convert(mode))
    assert decision.notes == ("alpha composited on white",)
    assert [dataclasses.replace(decision, notes=())] == gate.check(white)
    for dtype, mode in ((np.float32, "F"), (np.int32, "I")):
        with pytest.raises(ValueError, match=f"8 or 16 bits per value, got .* mode {mode}"):
            image_file(Image.fromarray(grey.astype(dtype)))


def test_threads_that_decode_leave_the_warnings_of_others_alone(gate):
    content = CAT.read_bytes()
    read_image(content)  # which adds the one filter that stays
    filters, show, before = list(warnings.filters), warnings.showwarning, sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: read_image(content), range(1000)))
    finally:
        sys.setswitchinterval(before)
    assert list(warnings.filters) == filters and warnings.showwarning is show


def test_what_will_not_be_accepted_is_said_at_once(caplog):
    Gate(PRETRAINED, alpha=0.0001)
    for which in ("images of the model's size", "resized images"):
        said = f"{which} will not be accepted: nothing can be flagged at alpha 0.0001"
        assert said in caplog.text
    with pytest.raises(ValueError, match="alpha"):
        Gate(PRETRAINED, alpha=0.0)
    with pytest.raises(BundleError, match="is not a bundle"):
        Gate(ROOT / "docs")


def test_a_transparent_colour_of_other_than_8_bits_is_judged_as_in_the_file(gate):
    grey = np.asarray(Image.open(CAT).convert("L")) >> 4
    nibbles = [bytes(row[::2] << 4 | row[1::2]) for row in grey]
    file = png_with_key(4, 0, nibbles, struct.pack(">H", int(np.bincount(grey.ravel()).argmax())))
    opened = Image.open(io.BytesIO(file))
    assert gate.check(opened) == gate.check(file)
    colours = np.asarray(Image.open(CAT).convert("RGB")).astype(">u2") * 257
    deep = png_with_key(16, 2, [row.tobytes() for row in colours], colours[0, 0].tobytes())
    loaded = Image.open(io.BytesIO(deep))
    loaded.load()
    for image in (deep, Image.open(io.BytesIO(deep)), loaded):
        (found,) = gate.check(image)
        assert found.is_error and "a transparent colour needs 8 bits" in str(found.reason)
