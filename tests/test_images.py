"""Reading and writing images of all formats, and files that are not images."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
import struct
import weakref

import numpy as np
import pytest
from PIL import Image, ImageOps

import ade_base.pictures.read
from ade_base.pictures.limits import ImageError
from ade_base.pictures.read import read_image
from ade_base.pictures.show import resize_centre, tile, write_png
from ade_base.pictures.view import Look
from ade_cli.main import main
from ade_client.client import image_file
from serving.api.service import Service
from serving.ingest.errors import ApiError
from serving.ingest.picture import Picture, prepare_image
from serving.ingest.requests import RawRequest
from tests.bomb_files import jpeg_of_stated_size
from tests.helpers import HAS_HEIF, PRETRAINED, ROOT, b64, encode, png_header, png_with_key

CAT = ROOT / "serving" / "examples" / "cat.png"
MODERN = ("AVIF", "HEIF") if HAS_HEIF else ("AVIF",)


@pytest.mark.parametrize(
    "shape", [(80, 48, 3), (48, 80, 3), (33, 64, 3), (31, 30, 3), (100, 101, 3), (20, 13, 3)]
)
def test_training_and_serving_crop_alike(shape, tmp_path):
    """Both take the same centre and use the same filter, so that verdicts hold."""
    from training.datasets import load_dataset

    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    data = write_png(image)
    served = prepare_image(data, (32, 32, 3), True)
    assert isinstance(served, Picture) and served.resized
    for i in range(40):  # enough for every part
        (tmp_path / f"{i}.png").write_bytes(data)
    (trained, *_) = load_dataset(str(tmp_path), None, 32).parts["train"].images[:1]
    assert np.array_equal(served.pixels, trained)


@pytest.fixture()
def picture(real_images):
    return Image.fromarray(real_images[0])


def test_the_centre_is_resized():
    """Training's squares and the service's ``resize: fit`` are the same pixels."""
    picture = np.zeros((60, 100, 3), np.uint8)
    picture[:, 20:80] = 200  # the centre square
    assert (resize_centre(picture, 8, 8) == 200).all()
    assert (resize_centre(picture, 8, 8) == prepare(picture, (8, 8, 3))).all()
    assert resize_centre(picture, 4, 8).shape == (4, 8, 3)
    assert resize_centre(picture, 60, 100) is picture


def prepare(pixels, shape):
    prepared = prepare_image(write_png(pixels), shape, True)
    assert isinstance(prepared, Picture)
    return prepared.pixels


def test_exif_orientation_is_applied(picture):
    exif = Image.Exif()
    exif[0x0112] = 6
    decoded = read_image(encode(picture, "PNG", exif=exif))
    assert np.array_equal(decoded.pixels, np.asarray(picture.transpose(Image.Transpose.ROTATE_270)))
    assert decoded.notes == ["EXIF orientation applied"]
    turned = read_image(encode(picture, "TIFF", tiffinfo={0x0112: 6}))
    assert np.array_equal(turned.pixels, decoded.pixels) and turned.notes == decoded.notes
    exif[0x0112] = 0  # some cameras write it
    for unturned in (encode(picture, "PNG", exif=exif), encode(picture, "TIFF", tiffinfo=exif)):
        decoded = read_image(unturned)
        assert np.array_equal(decoded.pixels, np.asarray(picture)) and not decoded.notes


@pytest.mark.parametrize("format", MODERN)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_avif_and_heic_are_upright(format, orientation):
    picture = Image.linear_gradient("L").resize((41, 31)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.info["exif"] = exif.tobytes()
    decoded = read_image(encode(picture, format, quality=95, exif=exif.tobytes()))
    expected = np.asarray(ImageOps.exif_transpose(picture))
    assert decoded.pixels.shape == expected.shape and decoded.size == expected.shape[1::-1]
    assert np.abs(decoded.pixels - expected.astype(float)).max() < 12


@pytest.mark.parametrize("format", MODERN)
def test_avif_and_heic_of_other_modes(picture, format):
    alpha = picture.copy()
    alpha.putalpha(0)
    decoded = read_image(encode(alpha, format))
    assert (decoded.pixels > 252).all() and decoded.notes == ["alpha composited on white"]
    red, blue = (Image.new("RGB", (32, 32), colour) for colour in ("red", "blue"))
    decoded = read_image(encode(red, format, save_all=True, append_images=[blue]))
    assert decoded.notes == ["first of several frames taken"]
    assert (decoded.pixels[..., 0] > 200).all() and (decoded.pixels[..., 2] < 60).all()


def test_heic_of_more_than_eight_bits():
    pillow_heif = pytest.importorskip("pillow_heif")
    levels = np.arange(64, dtype=np.uint16).reshape(8, 8).repeat(8, 0).repeat(8, 1) * 1024
    for mode, values, note in (
        ("I;16", levels, "converted from 16-bit greyscale to 8 bits"),
        ("RGB;16", np.stack([levels] * 3, 2), "converted from 10-bit colour to 8 bits"),
    ):
        out = io.BytesIO()
        pillow_heif.from_bytes(mode, (64, 64), values.tobytes()).save(out, quality=-1, chroma=444)
        decoded = read_image(out.getvalue())
        assert decoded.notes == [note]
        assert np.abs(decoded.pixels[..., 1] - (levels >> 8).astype(float)).max() <= 1


def test_heic_without_its_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    error = prepare_image(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", (32, 32, 3), True)
    assert isinstance(error, ApiError) and (error.status, error.code) == (415, "not_an_image")
    assert str(error) == (
        "this is a HEIC file; without the package pillow-heif only PNG, JPEG, WEBP, BMP, GIF, "
        "TIFF, AVIF are accepted. To install it: pip install 'pillow-heif>=1.8.1,<2'"
    )


@pytest.mark.parametrize(
    "size, scaled",
    [
        ((2047, 3000), (2047, 3000)),
        ((2048, 2051), (1024, 1026)),
        ((4096, 4100), (1024, 1025)),
        ((8200, 2600), (4100, 1300)),
    ],
)
@pytest.mark.parametrize("mode, orientation", [("RGB", 1), ("CMYK", 6), ("L", 3), ("RGB", 8)])
def test_large_jpegs_are_decoded_at_a_fraction_of_their_size(size, scaled, mode, orientation):
    """What is seen of them hardly differs; their own size is kept, upright."""
    noise = np.random.default_rng(0).integers(0, 256, (25, 35, 3), np.uint8)
    picture, exif = Image.fromarray(noise).resize(size).convert(mode), Image.Exif()
    exif[0x0112] = orientation
    data = encode(picture, "JPEG", quality=90, exif=exif)
    decoded = read_image(data)
    whole = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    turned = 1 if orientation < 5 else -1
    assert decoded.size == size[::turned] == whole.shape[1::-1]
    assert decoded.pixels.shape[1::-1] == scaled[::turned]
    if size == scaled:
        assert np.array_equal(decoded.pixels, whole)
    for side in (32, 224):
        seen, expected = (resize_centre(its, side, side) for its in (decoded.pixels, whole))
        difference = np.abs(seen - expected.astype(float))
        assert difference.mean() < 1.5 and difference.max() <= 8
    with pytest.raises(ImageError, match="damaged"):
        read_image(data[: len(data) // 2])


def test_a_large_heic_is_decoded_at_a_fraction_of_its_size():
    picture = Image.linear_gradient("L").resize((2050, 2101)).convert("RGBA")
    picture.putalpha(255)
    decoded = read_image(encode(picture, "HEIF", tile_size=0))
    assert (decoded.size, decoded.pixels.shape) == ((2050, 2101), (1051, 1025, 3))
    seen, expected = (resize_centre(its, 32, 32) for its in (decoded.pixels, np.asarray(picture)))
    assert np.abs(seen - expected[..., :3].astype(float)).max() <= 3


def test_alpha_goes_on_white(picture):
    """Also that of a palette."""
    picture.putalpha(0)
    image = Image.new("P", (4, 4), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    for file in (encode(picture, "PNG"), encode(image, "PNG", transparency=1)):
        decoded = read_image(file)
        assert (decoded.pixels == 255).all() and "alpha composited on white" in decoded.notes
    assert (read_image(encode(image, "PNG")).pixels == [0, 0, 255]).all()


def test_sixteen_bits_keep_the_high_byte():
    values = np.array([[0, 255, 256, 65535]], np.uint16)
    decoded = read_image(encode(Image.fromarray(values), "PNG"))
    assert decoded.pixels[0, :, 0].tolist() == [0, 0, 1, 255] and "16-bit" in decoded.notes[0]


@pytest.mark.parametrize(
    "bits, data, key",
    [(1, b"\xff", 1), (2, b"\x55", 1), (4, b"\x33\x33", 3), (16, b"\2\3" * 4, 515)],
)
def test_the_transparent_grey_of_a_png(bits, data, key):
    """Pillow spreads the values of fewer bits over 0 to 255, but not the transparent one."""
    grey = png_with_key(bits, 0, [data], struct.pack(">H", key))
    assert (read_image(grey).pixels == 255).all()
    assert "alpha composited on white" in read_image(grey).notes
    opaque = png_with_key(bits, 0, [data], struct.pack(">H", 0))
    assert len(np.unique(read_image(opaque).pixels)) == 1
    assert bits == 1 or not (read_image(opaque).pixels == 255).any()


def test_greyscale_of_sixteen_bits_in_a_tiff():
    values = np.array([[0, 1, 128, 255]], np.uint16) << 8
    sixteen = read_image(encode(Image.fromarray(values), "TIFF"))
    assert sixteen.pixels[0, :, 0].tolist() == [0, 1, 128, 255]


def test_greyscale_with_white_at_0():
    """Pillow inverts 8 bits, but not 16."""
    black, white = (struct.pack("<HHII", 262, 3, 1, at) for at in (1, 0))
    eight, sixteen = (
        encode(Image.fromarray(np.zeros((1, 4), kind)), "TIFF").replace(black, white)
        for kind in (np.uint8, np.uint16)
    )
    assert (read_image(eight).pixels == 255).all()
    for read in (read_image, lambda data: image_file(Image.open(io.BytesIO(data)))):
        with pytest.raises(ImageError, match="0 must be black"):
            read(sixteen)
    signed = encode(Image.fromarray(np.zeros((1, 4), np.uint16)), "TIFF", tiffinfo={339: 2})
    with pytest.raises(ValueError, match="must have"):
        image_file(Image.open(io.BytesIO(signed)))


def test_another_size_is_refused_by_the_header():
    with pytest.raises(ImageError, match="must be 32 x 32 pixels, got 3000 x 4000"):
        read_image(png_header(3000, 4000), (32, 32))


def test_what_is_converted_is_noted(picture):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue", "green")]
    film = encode(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    cmyk, grey, first = (
        read_image(file)
        for file in (
            encode(picture.convert("CMYK"), "JPEG"),
            encode(picture.convert("L"), "PNG"),
            film,
        )
    )
    assert cmyk.notes == ["converted from CMYK to RGB"]
    assert grey.notes == ["converted from L to RGB"] and (np.ptp(grey.pixels, axis=2) == 0).all()
    assert first.notes == ["first of several frames taken"]
    assert (first.pixels == [255, 0, 0]).all()


def test_frames_are_not_counted(monkeypatch):
    """Counting the frames of a TIFF takes time in the square of their number."""
    from PIL import TiffImagePlugin

    frames = [Image.new("L", (4, 4), level) for level in range(5)]
    data = encode(frames[0], "TIFF", save_all=True, append_images=frames[1:])
    monkeypatch.setattr(
        TiffImagePlugin.TiffImageFile, "n_frames", property(lambda self: pytest.fail("they were"))
    )
    decoded = read_image(data)
    assert (decoded.pixels == 0).all() and "first of several frames taken" in decoded.notes


def tiff_of(values, **options):
    return encode(Image.fromarray(np.array([[0, 1, 128, 255]], values)), "TIFF", **options)


# Of each file, what is wrong with it: a code, and words of the message.
BAD = {
    "empty": (b"", "not_an_image", "the image is empty"),
    "text": (b"hello", "not_an_image", "expected PNG"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not_an_image", "expected PNG"),
    "pdf": (b"%PDF-1.4", "not_an_image", "expected PNG"),
    "gif without a frame": (b"GIF89a", "not_an_image", "damaged"),
    "avif without a picture": (
        b"\0\0\0\x18ftypavif\0\0\0\0mif1avif",
        "not_an_image",
        "damaged",
    ),
    "film": (b"\0\0\0\x18ftypisom\0\0\0\0mif1avif", "not_an_image", "expected"),
    "png without its pixels": (png_header(100, 100), "not_an_image", "damaged"),
    "png of 3.6 billion pixels": (png_header(60000, 60000), "too_large", "may have at most"),
    "png of 25 million pixels": (png_header(5000, 5000), "too_large", "may have at most"),
    "jpeg of 200 million pixels": (
        jpeg_of_stated_size(16_000, 12_500),
        "too_large",
        "may have at most",
    ),
    "damaged exif": (
        encode(Image.new("RGB", (8, 8)), "PNG", exif=b"Exif\0\0II*\0"),
        "not_an_image",
        "the image is damaged",
    ),
    # Pillow's error has no message.
    "palette image without a palette": (
        png_with_key(8, 3, [b"\0\1\2\3"], None),
        "not_an_image",
        "damaged: ",
    ),
    "transparent colour of 16 bits": (
        png_with_key(16, 2, [struct.pack(">12H", *[257, 514, 771] * 4)], bytes(6)),
        "not_an_image",
        "needs 8 bits per value, this image has 16",
    ),
    "grey of 32 bits": (tiff_of(np.int32), "not_an_image", "8 or 16 bits per value, got 32"),
    "grey of fractions": (tiff_of(np.float32), "not_an_image", "got 32-bit floating point"),
    "signed grey": (tiff_of(np.uint8, tiffinfo={339: 2}), "not_an_image", "must have unsigned"),
    "signed grey of 16 bits": (tiff_of(np.uint16, tiffinfo={339: 2}), "not_an_image", "unsigned"),
}


@pytest.fixture(scope="module")
def found_in(gate, pretrained_engine, tmp_path_factory):
    """What each way of scoring says of every bad picture, among which one is good: (code, text)."""
    contents = [*(data for data, *_ in BAD.values()), CAT.read_bytes()]

    def over_http():
        found = []
        for data, *_ in BAD.values():  # one by one: together some have too many pixels
            values = {"images": [b64(data), b64(contents[-1])], "resize": "fit"}
            request = RawRequest("application/json", values)
            (answer,) = Service("score", pretrained_engine).answer([request])
            body = json.loads(answer.body)
            if answer.status == 200:
                body, good = body["results"]
                assert good["decision"] == "accept"
            found.append((body["error"]["code"], body["error"]["message"]))
        return found

    def in_the_gate():
        *bad, good = gate.check(contents)
        assert good.accepted and not any(one.accepted or not one.is_error for one in bad)
        return [(None, one.reason.removeprefix("not_scored: ")) for one in bad]

    def by_the_command_line():
        folder = tmp_path_factory.mktemp("bad")
        files = [folder / f"{i:02}.png" for i in range(len(contents))]
        for file, data in zip(files, contents, strict=True):
            file.write_bytes(data)
        with contextlib.redirect_stdout(printed := io.StringIO()):
            main(["score", *map(str, files), "--bundle", str(PRETRAINED), "--resize", "fit"])
        *bad, good = map(json.loads, printed.getvalue().splitlines())
        assert good["decision"] == "accept"
        assert {one["decision"] for one in bad} == {"no_verdict"}
        return [(one["error"], one["notes"]) for one in bad]

    ways = {way.__name__: way() for way in (over_http, in_the_gate, by_the_command_line)}
    return {way: dict(zip(BAD, found, strict=True)) for way, found in ways.items()}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_picture_has_the_same_reason_everywhere(name, found_in):
    data, code, words = BAD[name]
    with pytest.raises(ImageError, match=re.escape(words)) as refused:
        read_image(data)
    assert refused.value.code == code and str(refused.value)
    for way, found in found_in.items():
        its_code, text = found[name]
        assert its_code in (code, None) and words in text and "0x" not in text, way


def test_every_truncation_is_an_image_error(picture):
    """Unless what is cut off has nothing of the picture, such as the end mark of a PNG."""
    for format in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", *MODERN):
        data = encode(picture, format)
        whole = read_image(data).pixels
        for cut in range(0, len(data) - 1, max(1, len(data) // 40)):
            try:
                pixels = read_image(data[:cut]).pixels
            except ImageError:
                continue
            assert cut > len(data) - 20 and np.array_equal(pixels, whole), (format, cut)


def test_file_size_is_limited(monkeypatch, picture):
    monkeypatch.setattr(ade_base.pictures.read, "MAX_FILE_BYTES", 100)
    with pytest.raises(ImageError, match="may have at most 100 bytes"):
        read_image(encode(picture, "PNG"))


def test_png_text_and_grey():
    pixels = np.arange(16, dtype=np.uint8).reshape(4, 4, 1)
    image = Image.open(io.BytesIO(write_png(pixels, {"ade:seed": "7"})))
    assert image.info["ade:seed"] == "7" and np.array_equal(np.asarray(image), pixels[..., 0])


def test_tile():
    images = np.stack([np.full((2, 2, 3), i, np.uint8) for i in range(5)])
    grid = tile(images)
    assert grid.shape == (4, 6, 3)
    assert grid[0, :, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert grid[3, :, 0].tolist() == [3, 3, 4, 4, 255, 255]


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF"])
def test_a_turned_photo_is_the_same_as_a_file_and_as_a_picture(form):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture, out = Image.linear_gradient("L").resize((12, 8)).convert("RGB"), io.BytesIO()
    picture.save(out, form, exif=exif)
    by_file = read_image(out.getvalue()).pixels
    by_picture = read_image(image_file(Image.open(io.BytesIO(out.getvalue())))).pixels
    assert by_file.shape == (12, 8, 3) and np.array_equal(by_file, by_picture)


def test_a_large_colour_profile_is_no_obstacle_to_a_picture():
    """A file of CMYK may have one that a PNG may not."""
    picture, out = Image.linear_gradient("L").convert("RGB"), io.BytesIO()
    picture.save(out, "JPEG", icc_profile=np.random.default_rng(0).bytes(1_500_000))
    file = image_file(Image.open(io.BytesIO(out.getvalue())))
    assert np.array_equal(read_image(file).pixels, read_image(out.getvalue()).pixels)


def test_a_view_sees_the_original_which_is_not_kept(real_images, monkeypatch):
    """What an encoder needs of a picture is made while the original is in memory."""
    large = np.ascontiguousarray(real_images[0].repeat(3, 0).repeat(2, 1))
    originals: list[weakref.ref[np.ndarray]] = []
    look = Look(64)

    def of(self, original):
        originals.append(weakref.ref(original))
        return _of(self, original)

    _of = Look.of
    monkeypatch.setattr(Look, "of", of)
    for source, resize in ((write_png(large), True), (write_png(real_images[0]), False)):
        for shape in ((32, 32, 3), (32, 32, 1)):  # for a grey model, too, in colour
            picture = prepare_image(source, shape, resize, lambda resized: look)
            assert isinstance(picture, Picture) and picture.view is not None
            original = large if resize else real_images[0]
            assert np.array_equal(picture.view.pixels, _of(look, original).pixels)
            assert picture.view.original == original.shape[:2]
            assert (originals[-1]() is not None) == (not resize and shape[2] == 3)  # the pixels
    refused = prepare_image(write_png(large), (32, 32, 3), False, lambda resized: look)
    assert isinstance(refused, ApiError) and refused.code == "wrong_size"
    assert len(originals) == 4  # only pictures that can be used are seen
