"""Lossless coding: every step is exact, archives come back, and damage is contained."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import time
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

pytest.importorskip("constriction")

from ade_base.pictures.convert import DecodedImage
from ade_base.pictures.decoders import DecoderError
from ade_base.pictures.limits import ImageError
from ade_base.pictures.read import read_image
from ade_cli.main import main
from ade_model.checkpoint import load_model, save_model
from ade_model.config import ModelConfig
from ade_model.model import ADEModel
from export.graphs import Graphs
from export.parity import make_inputs
from export.to_onnx import export_onnx
from export.write import add_graphs
from extensions.codec import archive as archives
from extensions.codec import chunks, decompress, lattice, networks
from extensions.codec import compress as compressing
from extensions.codec.chunks import Figures
from extensions.codec.compress import Report, compress
from extensions.codec.errors import CodingError, Damaged, NotCoded
from extensions.codec.graphs import CodecError, check_codable, write_codec
from extensions.codec.image_coder import ImageCoder
from extensions.codec.lifting import COEFFICIENT_BITS, factorize
from extensions.codec.pictures import Picture, read_picture
from extensions.codec.sources import ArraySource, open_source
from extensions.codec.stack import Stack
from serving.engine.bundle import Bundle, open_bundle, verify_bundle, write_manifest
from serving.engine.engine import InferenceEngine
from serving.engine.signatures import inputs_of
from tests.helpers import PRETRAINED, ROOT, make_folder, make_model, make_traps, narrow
from training.recipes import recipe_names

BLOCKS = {"widths": (8, 8), "latent_channels": (3, 2), "decoder_blocks": (1, 1)}
FLOW = {"flow_couplings": 1, "flow_width": 8}
CONFIGS = {
    "av-ade": ModelConfig(image_size=8, **BLOCKS, **FLOW),
    "v-ade": ModelConfig(image_size=8, dequantizer_width=8, **BLOCKS, **FLOW),
    "flagship": ModelConfig(
        image_size=8,
        widths=(8, 8),
        latent_channels=(4, 2),
        latent_groups=2,
        decoder_blocks=(1, 1),
        **FLOW,
    ),
    "real-nvp": ModelConfig(
        image_size=8,
        widths=(),
        latent_channels=(),
        decoder_blocks=(),
        flow_scales=2,
        flow_mask="checkerboard",
        **FLOW,
    ),
    "vae": ModelConfig(
        image_size=8,
        channels=1,
        widths=(8, 8),
        latent_channels=(3, 0),
        decoder_blocks=(1, 0),
        flow_scales=0,
        sigma="scalar",
    ),
}


def fitted(config: ModelConfig, images: np.ndarray) -> ADEModel:
    """A model trained for some seconds."""
    model = make_model(config, scale=0.06).train()
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(150):
        chosen = images[torch.randint(len(images), (50,), generator=generator).numpy()]
        optimizer.zero_grad()
        (-log_weights(model, chosen, generator).mean() / config.num_dims).backward()
        optimizer.step()
    return model.eval()


def log_weights(model: ADEModel, images: np.ndarray, generator: torch.Generator) -> torch.Tensor:
    """Of one draw for each image, whose mean is the ELBO of 8-bit images; nats."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    seen = model.dequantize(pixels, torch.rand(pixels.shape, generator=generator))
    shapes = model.config.latent_shapes
    eps = [torch.randn(len(images), *shape, generator=generator) for shape in shapes]
    return model.elbo_terms(seen, eps).log_weight - model.config.num_dims * np.log(256)


def make_bundle(folder: Path, name: str, images: np.ndarray, scores: bool) -> Bundle:
    """A codec's bundle of a model of these images, with the score graph if needed."""
    config = CONFIGS[name]
    folder.mkdir()
    model = fitted(config, images[..., : config.channels])
    save_model(model, folder, {"recipe": name})
    write_codec(model, folder)
    shape = (config.image_size, config.image_size, config.channels)
    if scores:
        graphs = Graphs(model)
        names = inputs_of("score", graphs.levels)
        example = np.zeros((2, *shape), np.uint8)
        export_onnx(graphs, "score", make_inputs(example, config.latent_shapes, names), folder)
    fields = {
        "name": name,
        "recipe": name,
        "image_shape": list(shape),
        "latent_shapes": [list(s) for s in config.latent_shapes],
        "operations": ["score"],
        "data": {"name": "corners", "splits": {}},
    }
    write_manifest(folder, fields)
    return open_bundle(folder)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, small_images: np.ndarray) -> Bundle:
    folder = tmp_path_factory.mktemp("bundles") / "av-ade"
    return make_bundle(folder, "av-ade", small_images, scores=True)


@pytest.fixture(scope="module", params=list(CONFIGS))
def coded(
    request: pytest.FixtureRequest,
    bundle: Bundle,
    tmp_path_factory: pytest.TempPathFactory,
    small_images: np.ndarray,
) -> tuple[ImageCoder, ADEModel]:
    name = request.param
    if name != "av-ade":
        folder = tmp_path_factory.mktemp(name) / name
        bundle = make_bundle(folder, name, small_images, scores=False)
    return ImageCoder(networks.Networks(bundle)), load_model(bundle.folder)


def random_words(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**32, count, dtype=np.uint32)


def hard_images(shape: tuple[int, ...]) -> np.ndarray:
    checks = (np.indices(shape[:2]).sum(0) % 2 * 255).astype(np.uint8)
    return np.stack(
        [
            np.zeros(shape, np.uint8),
            np.full(shape, 255, np.uint8),
            np.full(shape, 127, np.uint8),
            np.repeat(checks[:, :, None], shape[2], 2),
            np.random.default_rng(0).integers(0, 256, shape, np.uint8),
        ]
    )


@pytest.mark.parametrize("n", [2, 3, 12, 48])
def test_lifting_steps_are_the_rotation_and_exact(n: int) -> None:
    generator = np.random.default_rng(n)
    matrix = np.linalg.qr(generator.normal(size=(n, n)))[0]
    lifting = factorize(matrix)
    rotation = lattice.Rotation(lifting.signs, lifting.steps / 2.0**COEFFICIENT_BITS)
    product = np.diag(rotation.signs).astype(float)
    for step in rotation.steps:
        product += step @ product
    np.testing.assert_allclose(product, matrix, atol=1e-5)
    x = generator.integers(-(2**18), 2**18, (n, 4, 4))
    y = rotation.forward(x)
    assert np.abs(y.reshape(n, -1) - matrix @ x.reshape(n, -1)).max() < 10
    assert np.array_equal(rotation.inverse(y), x)


def test_a_matrix_that_is_not_orthogonal_has_no_lifting_steps() -> None:
    with pytest.raises(ValueError, match="not orthogonal"):
        factorize(np.ones((3, 3)))


@pytest.mark.parametrize("scale", [0.01, 0.7, 12.0, 1000.0])
def test_stretching_is_exact_and_costs_its_log_determinant(scale: float) -> None:
    generator = np.random.default_rng(0)
    x = generator.integers(-(2**18), 2**18, 3000)
    log_scales = np.log(scale) + 0.3 * generator.normal(size=x.size)
    shifts = generator.integers(-(2**20), 2**20, x.size)
    stack = Stack(words := random_words(4000), sealed=True)
    before = stack.bits
    y = lattice.stretch(x, log_scales, shifts, stack)
    spent = before - stack.bits
    if scale == 0.7:
        np.testing.assert_allclose(y, x * np.exp(log_scales) + shifts, rtol=1e-3, atol=2**11)
        assert abs(spent - log_scales.sum() / np.log(2)) < 0.002 * x.size
    # Far smaller and larger scales cost more, but are exact too.
    assert np.array_equal(lattice.shrink(y, log_scales, shifts, stack), x)
    assert np.array_equal(stack.unseal(), words)


def test_a_stack_stores_any_value_and_gives_its_bits_back() -> None:
    generator = np.random.default_rng(1)
    n = 2000
    means, scales = 1e5 * generator.normal(size=n), np.exp(generator.uniform(-2, 14, n))
    stack = Stack(words := random_words(3000), sealed=True)
    drawn = stack.draw_gaussian(means, scales)
    assert abs(np.mean((drawn - means) / scales)) < 0.1
    assert 0.9 < np.std((drawn - means) / scales) < 1.1
    values = np.concatenate([drawn[:-4], [2**36, -(2**36), 0, 1]])
    stack.push_gaussian(values, means, scales)
    assert np.array_equal(stack.pop_gaussian(means, scales), values)
    stack.undraw_gaussian(drawn, means, scales)
    assert np.array_equal(stack.unseal(), words)
    with pytest.raises(Damaged, match="not drawn"):
        stack.undraw_gaussian(np.array([10**6]), np.zeros(1), np.ones(1))


@pytest.mark.parametrize(
    ("mean", "scale"),
    [(np.nan, 1), (0, np.nan), (0, 0), (0, -1), (np.inf, 1), (1e300, 1), (0, 1e300)],
)
def test_a_stack_refuses_what_would_end_the_process(mean: float, scale: float) -> None:
    stack = Stack(random_words(8), sealed=True)
    for call in (stack.draw_gaussian, stack.pop_gaussian):
        with pytest.raises(NotCoded):
            call(np.array([mean], float), np.array([scale], float))
    with pytest.raises(NotCoded):
        stack.pop_uniform(np.array([1]))


def test_every_image_comes_back(
    coded: tuple[ImageCoder, ADEModel], small_images: np.ndarray
) -> None:
    coder, model = coded
    real = small_images[:12, :, :, : model.config.channels]
    images = np.concatenate([real, hard_images(real.shape[1:])])
    stack = Stack(words := random_words(3000), sealed=True)
    for image in images:
        coder.encode(image, stack)
    back = Stack(stack.finish(), sealed=False)
    for image in images[::-1]:
        assert np.array_equal(coder.decode(back), image)
    assert np.array_equal(back.unseal(), words)


def test_the_net_rate_is_the_bound(
    coded: tuple[ImageCoder, ADEModel], small_images: np.ndarray
) -> None:
    """Neither more nor less, for images that the model fits.

    It would be less where a model is surprised: the coder gives a value that is more than about 5
    standard deviations from its mean 24 bits, and a Gaussian more.
    """
    coder, model = coded
    images = small_images[..., : model.config.channels]
    stack = Stack(random_words(3000), sealed=True)
    before = stack.bits
    for image in images:
        coder.encode(image, stack)
    rate = (stack.bits - before) / images.size
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        draws = [log_weights(model, images, generator) for _ in range(8)]
    bounds = -torch.stack(draws) / np.log(2) / images[0].size
    # The rate is that of one draw for each image, so it differs by chance too.
    error = float(bounds.std(0).square().mean().sqrt()) / len(images) ** 0.5
    assert error < 0.001 * float(bounds.mean())
    excess = rate - float(bounds.mean())
    assert -3 * error < excess < 3 * error + 0.001 * float(bounds.mean())


def test_no_source_is_coded_below_its_entropy(coded: tuple[ImageCoder, ADEModel]) -> None:
    """Of uniform noise that is 8 bits per value, whatever the model (Shannon, 1948)."""
    coder, model = coded
    shape = (100, model.config.image_size, model.config.image_size, model.config.channels)
    stack = Stack(random_words(3000, seed=2), sealed=True)
    before = stack.bits
    for image in np.random.default_rng(3).integers(0, 256, shape, np.uint8):
        coder.encode(image, stack)
    assert stack.bits - before > 8 * np.prod(shape)


def test_all_images_of_a_tiny_alphabet_can_be_coded(bundle: Bundle) -> None:
    """Exhaustive where that is possible: every value of one pixel in every channel."""
    coder = ImageCoder(networks.Networks(bundle))
    words = random_words(1500)
    for level in range(256):
        image = np.full((8, 8, 3), 90, np.uint8)
        image[4, 3, level % 3] = level
        stack = Stack(words, sealed=True)
        coder.encode(image, stack)
        assert np.array_equal(coder.decode(stack), image)


@pytest.fixture
def folder(tmp_path: Path, small_images: np.ndarray) -> Path:
    """Plain images, and every kind that is stored differently."""
    folder = tmp_path / "images"
    for i, image in enumerate(small_images[:150]):
        path = folder / f"class {i % 3}" / f"{i:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    Image.fromarray(small_images[0]).resize((40, 20)).save(folder / "wide.png")
    Image.fromarray(small_images[1]).convert("L").save(folder / "grey.png")
    Image.fromarray(small_images[2]).convert("RGBA").save(folder / "alpha.png")
    Image.fromarray(small_images[3]).save(folder / "photo.jpg")
    Image.fromarray(small_images[4]).save(folder / "bitmap.bmp")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    (folder / "empty.png").write_bytes(b"")
    return folder


def contents(folder: Path) -> dict[str, Any]:
    """What must come back: pixels of PNG and BMP files, bytes of all others."""
    found: dict[str, Any] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = str(path.relative_to(folder))
        try:
            image = Image.open(path)
            found[name] = (image.mode, image.size, image.tobytes())
        except OSError:
            found[name] = path.read_bytes()
    return found


def test_a_folder_comes_back(
    folder: Path, bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, back = tmp_path / "out.ade", tmp_path / "back"
    assert main(["compress", str(folder), str(out), "--bundle", str(bundle.folder)]) == 0
    printed = capsys.readouterr().out
    assert "net rate" in printed and "bound of ade score" in printed
    assert f"archive: {out.stat().st_size} bytes" in printed
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "out.ade"]
    assert main(["decompress", str(out), str(back), "--bundle", str(bundle.folder)]) == 0
    assert contents(back) == contents(folder)
    capsys.readouterr()
    # Nothing is overwritten.
    for words in (["compress", folder, out], ["decompress", out, back]):
        assert main([*map(str, words), "--bundle", str(bundle.folder)]) == 2
        said = capsys.readouterr().err
        assert "exists" in said and "img/s" not in said
    assert (
        main(["decompress", str(out), str(tmp_path / "x.npy"), "--bundle", str(bundle.folder)]) == 2
    )
    assert "holds files" in capsys.readouterr().err


def test_files_that_cannot_be_read_are_named_and_left_out(
    folder: Path, bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An archive is often kept instead of its files: its exit status says that some lack."""
    expected = contents(folder)
    reasons = make_traps(folder)
    out, back = tmp_path / "out.ade", tmp_path / "back"
    words = ["--bundle", str(bundle.folder)]
    assert main(["compress", str(folder), str(out), *words]) == 3
    said = capsys.readouterr().err
    assert all(f"left out {folder / name}: {why}" in said for name, why in reasons.items())
    assert f"warning: 4 files could not be read: not in {out}" in said
    # Pictures of other kinds may be lost as well; other files are only counted.
    kept = tmp_path / "kept"
    kept.mkdir()
    shutil.copy(next(folder.glob("*.png")), kept)
    (kept / "labels.csv").touch()
    for status, other in ((0, None), (3, "a.jxl")):
        if other is not None:
            (kept / other).touch()
        assert main(["compress", str(kept), str(tmp_path / f"{status}.ade"), *words]) == status
        count = "2 files" if other else "1 file"
        assert f"{count} of other kinds: not in {tmp_path / f'{status}.ade'}" in (
            capsys.readouterr().err
        )
    assert main(["decompress", str(out), str(back), *words]) == 0
    assert contents(back) == expected
    only = tmp_path / "only"
    only.mkdir()
    make_traps(only)
    assert main(["compress", str(only), str(tmp_path / "none.ade"), *words]) == 2
    assert "only: no image can be read; " in capsys.readouterr().err
    assert not list(tmp_path.glob("none*"))


def test_metadata_is_kept_on_request(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(with_chunks(tEXt=b"Comment\0" + b"secret" * 99))
    for keep in (False, True):
        out = tmp_path / f"{keep}.ade"
        report = compress(open_source(tmp_path / "in", keep), out, bundle)
        decompress.decompress(out, tmp_path / str(keep), bundle)
        same = (tmp_path / "in" / "a.png").read_bytes() == (
            tmp_path / str(keep) / "a.png"
        ).read_bytes()
        assert same == keep and report.without_metadata == (not keep)


def test_a_header_with_more_images_than_any_file_is_refused() -> None:
    fields = {name: kind() for name, kind in archives._FIELDS.items()}
    header = {**fields, "format_version": 1, "kind": "array", "images": 2**40 - 1}
    with pytest.raises(CodingError, match="no valid field kind or images"):
        archives.scan(io.BytesIO(archives.header_bytes(header)), Path("a.ade"))


@pytest.mark.parametrize("name, format", [("a.png", "JPEG"), ("a.png", "BMP"), ("a.bmp", "PNG")])
def test_a_file_with_the_name_of_another_format_is_kept(name: str, format: str) -> None:
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, format)
    assert read_picture(name, out.getvalue(), False) == Picture(None, out.getvalue())


def saved(format: str, mode: str = "RGB") -> bytes:
    out = io.BytesIO()
    Image.fromarray(hard_images((8, 8, 3))[4]).convert(mode).save(out, format)
    return out.getvalue()


def grey_of(depth: int) -> bytes:
    """A grey PNG with samples of a few bits, which Pillow reads and cannot write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content).to_bytes(4, "big")
        return len(content).to_bytes(4, "big") + kind + content + checksum

    head = (8).to_bytes(4, "big") * 2 + bytes([depth, 0, 0, 0, 0])
    rows = b"".join(b"\0" + bytes(range(depth)) for _ in range(8))
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def with_chunks(**contents: bytes) -> bytes:
    """A PNG with further chunks before its pixels."""
    chunks = [
        len(content).to_bytes(4, "big")
        + (named := type.encode() + content)
        + zlib.crc32(named).to_bytes(4, "big")
        for type, content in contents.items()
    ]
    return saved("PNG")[:33] + b"".join(chunks) + saved("PNG")[33:]


def moved(bmp: bytes) -> bytes:
    """With something between header and pixels."""
    return bmp[:10] + (64).to_bytes(4, "little") + bmp[14:54] + b"a secret.." + bmp[54:]


def test_the_resolution_of_a_scan_is_metadata(small_images: np.ndarray) -> None:
    for dpi, is_metadata in ((96, False), (300, True)):
        out = io.BytesIO()
        Image.fromarray(small_images[0]).save(out, "BMP", dpi=(dpi, dpi))
        assert read_picture("a.bmp", out.getvalue(), False).has_metadata == is_metadata
        kept = read_picture("a.bmp", out.getvalue(), True)
        assert (kept.pixels is None) == is_metadata


@pytest.mark.parametrize(
    "name, data",
    [
        ("a.bmp", saved("BMP", "RGBA")),  # readers ignore the fourth byte
        ("a.bmp", saved("BMP") + b"a profile"),
        ("a.bmp", moved(saved("BMP"))),
        ("a.png", saved("PNG")[:-12]),  # without IEND
        ("a.png", saved("PNG")[:-20] + b"x" + saved("PNG")[-19:]),  # a wrong checksum
        ("a.png", saved("PNG") + b"more"),
        ("a.png", saved("PNG")[:8] + saved("PNG")[-12:]),  # IEND alone
        ("a.png", grey_of(2)),
        ("a.png", grey_of(4)),
        ("a.png", with_chunks(iCCP=b"name\0\0" + zlib.compress(b"a profile"))),
        ("a.png", with_chunks(gAMA=(100_000).to_bytes(4, "big"))),
        ("a.png", with_chunks(cHRM=bytes(range(32)))),
        ("a.png", with_chunks(cICP=b"\x0c\x0d\0\1")),
    ],
)
def test_a_file_that_its_pixels_do_not_restore_is_kept(name: str, data: bytes) -> None:
    assert read_picture(name, data, False) == Picture(None, data)
    assert read_picture("a.png", grey_of(8), False).pixels is not None
    plain = saved("PNG" if name == "a.png" else "BMP")
    assert read_picture(name, plain, False).pixels is not None
    for gamma, further in ((45455, {}), (100_000, {"sRGB": b"\0"})):
        srgb = with_chunks(gAMA=gamma.to_bytes(4, "big"), **further)
        assert read_picture("a.png", srgb, False).pixels is not None


def save_array(path: Path, images: np.ndarray) -> ArraySource:
    np.save(path, images)
    return ArraySource(path)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("extensions.codec.pictures.PAUSE_S", 0.0)


@pytest.fixture
def archived(
    bundle: Bundle, small_images: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """An archive of an array in four chunks."""
    monkeypatch.setattr(compressing, "MAX_IMAGES", 50)
    source = save_array(tmp_path / "in.npy", small_images[:200])
    report = compress(source, tmp_path / "out.ade", bundle, verify=False)
    assert report.figures.coded > 50
    return tmp_path / "out.ade"


def chunks_of(path: Path) -> list[archives.Chunk]:
    with open(path, "rb") as file:
        return archives.scan(file, path).chunks


def test_a_damaged_chunk_loses_its_own_images_alone(
    archived: Path,
    bundle: Bundle,
    small_images: np.ndarray,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    good = archived.read_bytes()
    chunk = chunks_of(archived)[1]
    # In the content of the second chunk, and in its record.
    for number, place in enumerate((chunk.offset + chunk.length // 2, chunk.offset - 50)):
        bad = bytearray(good)
        bad[place] ^= 1
        archived.write_bytes(bad)
        back = tmp_path / f"back{number}.npy"
        words = ["decompress", str(archived), str(back), "--bundle", str(bundle.folder)]
        assert main(words) == 3
        printed = capsys.readouterr()
        assert "150 of 200" in printed.out
        assert "checksum of the whole is wrong" in printed.err
        assert "images 51 to 100 of the archive did not come back" in printed.err
        found = np.load(back)
        assert np.array_equal(found[:50], small_images[:50])
        assert not found[50:100].any()
        assert np.array_equal(found[100:], small_images[100:200])


def test_a_damaged_header_is_replaced_by_its_copy(
    archived: Path, bundle: Bundle, small_images: np.ndarray, tmp_path: Path
) -> None:
    good = archived.read_bytes()
    for i, place in enumerate((3, 100, 400)):
        bad = bytearray(good)
        bad[place] ^= 1
        archived.write_bytes(bad)
        result = decompress.decompress(archived, tmp_path / f"{i}.npy", bundle)
        assert result.restored == 200 and not result.is_intact
        assert np.array_equal(np.load(tmp_path / f"{i}.npy"), small_images[:200])
    # That of an archive of whole files may be the copy of one of them.
    archived.write_bytes(b"x" + good[1:-100])
    with pytest.raises(CodingError, match="not an archive"):
        decompress.decompress(archived, tmp_path / "none.npy", bundle)


class DamagedDisk(io.FileIO):
    """A file one page of which cannot be read."""

    page, size = 0, 512

    @classmethod
    def check(cls, start: int, size: int) -> None:
        if start < cls.page + cls.size and cls.page < start + size:
            raise OSError(errno.EIO, "Input/output error")

    def readinto(self, buffer: Any, /) -> int | None:
        self.check(self.tell(), len(memoryview(buffer)))
        return super().readinto(buffer)


def test_a_page_that_the_disk_cannot_read_loses_its_own_chunk_alone(
    archived: Path,
    bundle: Bundle,
    small_images: np.ndarray,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chunks, pread = chunks_of(archived), os.pread

    def damaged(file: int, size: int, position: int) -> bytes:
        DamagedDisk.check(position, size)
        return pread(file, size, position)

    monkeypatch.setattr(archives, "_PAGE", DamagedDisk.size)
    monkeypatch.setattr(archives.os, "pread", damaged)

    def damaged_open(path: Path, mode: str) -> Any:
        return io.BufferedReader(DamagedDisk(path)) if path == archived else open(path, mode)

    monkeypatch.setattr(decompress, "open", damaged_open, raising=False)
    # In the content of the second chunk, and at its record.
    for i, place in enumerate((chunks[1].offset + 2000, chunks[1].offset - 20)):
        monkeypatch.setattr(DamagedDisk, "page", place // DamagedDisk.size * DamagedDisk.size)
        result = decompress.decompress(archived, tmp_path / f"{i}.npy", bundle)
        assert range(50, 100) in result.lost and not result.is_intact
        found = np.load(tmp_path / f"{i}.npy")
        assert np.array_equal(found[100:], small_images[100:200])


def test_a_truncated_archive_gives_what_it_has(
    archived: Path, bundle: Bundle, small_images: np.ndarray, tmp_path: Path
) -> None:
    good = archived.read_bytes()
    chunk = chunks_of(archived)[2]
    archived.write_bytes(good[: chunk.offset + 100])
    result = decompress.decompress(archived, tmp_path / "back.npy", bundle)
    assert result.is_truncated and result.restored == 100 and result.lost == [range(100, 200)]
    assert np.array_equal(np.load(tmp_path / "back.npy")[:100], small_images[:100])
    for length, message in (
        (0, "not an archive"),
        (20, "truncated"),
        (200, "damaged or truncated"),
    ):
        archived.write_bytes(good[:length])
        with pytest.raises(CodingError, match=message):
            decompress.decompress(archived, tmp_path / "none.npy", bundle)
    archived.write_bytes(good[: chunks_of_start(good)])
    with pytest.raises(CodingError, match="no complete chunk"):
        decompress.decompress(archived, tmp_path / "none.npy", bundle)
    assert not list(tmp_path.glob("*none*"))


def chunks_of_start(data: bytes) -> int:
    return data.index(b"ADEc")


def test_a_pipe_is_no_archive(bundle: Bundle, tmp_path: Path) -> None:
    """Opening it would wait for a writer."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CodingError, match="pipe must be a regular file"):
        decompress.decompress(tmp_path / "pipe", tmp_path / "back", bundle)


def test_another_bundle_is_refused(archived: Path, bundle: Bundle, tmp_path: Path) -> None:
    other = Bundle(
        bundle.folder,
        {**bundle.manifest, "name": "other", "files": {**bundle.manifest["files"]}},
    )
    codec = bundle.folder / "codec.json"
    before = codec.read_text()
    try:
        codec.write_text(before + "\n")
        other.manifest["files"]["codec.json"] = hashlib.sha256(codec.read_bytes()).hexdigest()
        with pytest.raises(CodingError, match=r"made with the model 'av-ade@.* other@"):
            decompress.decompress(archived, tmp_path / "back.npy", other)
    finally:
        codec.write_text(before)


def test_another_processor_is_announced_and_its_numbers_are_checked(
    archived: Path,
    bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = networks.fingerprint()
    monkeypatch.setattr(decompress, "fingerprint", lambda: {**here, "cpu": "Another CPU"})
    warnings: list[str] = []
    result = decompress.decompress(archived, tmp_path / "a.npy", bundle, warnings.append)
    assert not result.lost and "cpu:" in warnings[0] and "Another CPU" in warnings[0]
    # If the last digits of a network differ, the images do not come back, and this is noticed.
    run = networks.Networks.run
    monkeypatch.setattr(
        networks.Networks,
        "run",
        lambda self, graph, inputs: [v * np.float32(1 + 2e-7) for v in run(self, graph, inputs)],
    )
    with pytest.raises(CodingError, match="no image came back"):
        decompress.decompress(archived, tmp_path / "b.npy", bundle)
    assert not (tmp_path / "b.npy").exists()


def test_chunks_that_do_not_come_back_are_stored_without_the_model(
    bundle: Bundle, small_images: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, calls = networks.Networks.run, iter(range(10**9))
    with monkeypatch.context() as patch:
        patch.setattr(
            networks.Networks,
            "run",
            lambda self, graph, inputs: [
                v + np.float32(1e-6 * next(calls)) for v in run(self, graph, inputs)
            ],
        )
        source = save_array(tmp_path / "in.npy", small_images[:100])
        report = compress(source, tmp_path / "out.ade", bundle)
    assert report.not_reproduced == 1
    assert "did not reproduce" in "\n".join(report.lines())
    decompress.decompress(tmp_path / "out.ade", tmp_path / "back.npy", bundle)
    assert np.array_equal(np.load(tmp_path / "back.npy"), small_images[:100])


BUSY = ImageError("too_large", "not decoded in time", is_transient=True)


@pytest.mark.parametrize("error", [BUSY, MemoryError(), DecoderError("did not start")])
def test_a_machine_that_is_busy_for_a_moment_loses_nothing(
    error: Exception,
    archived: Path,
    bundle: Bundle,
    small_images: np.ndarray,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    errors = [error] * 2

    def fail_at_first(data: bytes) -> DecodedImage:
        if errors:
            raise errors.pop()
        return read_image(data)

    monkeypatch.setattr("extensions.codec.pictures.read_image", fail_at_first)
    decompress.decompress(archived, tmp_path / "back.npy", bundle)
    assert np.array_equal(np.load(tmp_path / "back.npy"), small_images[:200])


# The machine that compressed it may have been faster.
SLOW = ImageError("too_large", "the image takes more than 2 seconds to decode")


@pytest.mark.parametrize("reason", [BUSY, SLOW], ids=["busy", "slow"])
def test_a_machine_that_is_too_busy_for_a_chunk_restores_the_others(
    reason: Exception,
    archived: Path,
    bundle: Bundle,
    small_images: np.ndarray,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    busy = [*small_images[[51]]]  # stored without the model, and not the first of its chunk

    def fail(data: bytes) -> DecodedImage:
        image = read_image(data)
        if any(np.array_equal(image.pixels, pixels) for pixels in busy):
            raise reason
        return image

    monkeypatch.setattr("extensions.codec.pictures.read_image", fail)
    words = ["decompress", str(archived), "--bundle", str(bundle.folder)]
    assert main([*words, str(tmp_path / "back.npy")]) == 3
    printed = capsys.readouterr().err
    assert f"images 51 to 100 are intact: an image could not be decoded now ({reason})" in printed
    assert "repeat the command" in printed and "with another OUT" in printed
    assert "damaged" not in printed
    found = np.load(tmp_path / "back.npy")
    assert not found[50:100].any()
    found[50:100] = small_images[50:100]
    assert np.array_equal(found, small_images[:200])
    busy += [*small_images[:200]]
    assert main([*words, str(tmp_path / "none.npy")]) == 2
    assert "no image came back: an image could not be" in capsys.readouterr().err


def test_an_archive_in_its_folder_is_no_other_file(
    folder: Path, bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compress", str(folder), str(folder / "all.ade"), "--bundle", str(bundle.folder)]
    assert main(words) == 0
    assert "of other kinds" not in capsys.readouterr().err


def test_names_that_the_file_system_takes_for_one_are_told(
    folder: Path,
    bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, back = tmp_path / "out.ade", tmp_path / "back"
    compress(open_source(folder), out, bundle)
    for error, reason in (
        (FileExistsError(errno.EEXIST, "File exists"), "is the name of another image, too"),
        (OSError(errno.ENAMETOOLONG, "File name too long"), "is too long here"),
        (OSError(errno.EINVAL, "Invalid argument"), "is not permitted here"),
    ):

        def refuse(path: Path, mode: str, error: OSError = error) -> Any:
            if mode == "xb":
                raise error
            return open(path, mode)

        with monkeypatch.context() as patch:
            patch.setattr(decompress, "open", refuse, raising=False)
            words = ["--bundle", str(bundle.folder)]
            assert main(["decompress", str(out), str(back), *words]) == 2
        said = capsys.readouterr().err
        assert reason in said and "are intact: " in said and "damaged" not in said
        assert ".tmp" not in said


def test_a_busy_machine_is_no_reason_to_do_without_the_model(
    bundle: Bundle,
    small_images: np.ndarray,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(data: bytes) -> DecodedImage:
        raise BUSY

    source = save_array(tmp_path / "in.npy", small_images[:100])
    with monkeypatch.context() as patch:
        patch.setattr("extensions.codec.pictures.read_image", fail)
        with pytest.raises(CodingError, match="an image could not be .* repeat the command"):
            compress(source, tmp_path / "out.ade", bundle)
    assert (tmp_path / "out.ade.part").exists()
    assert compress(source, tmp_path / "out.ade", bundle).not_reproduced == 0


def test_a_picture_that_a_busy_machine_cannot_read_is_no_file(
    folder: Path, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would take more room for good, and a resumed run would find other images than before."""

    def fail(data: bytes) -> DecodedImage:
        raise BUSY

    with monkeypatch.context() as patch:
        patch.setattr("extensions.codec.pictures.read_image", fail)
        with pytest.raises(CodingError, match="an image could not be .* repeat the command"):
            compress(open_source(folder), tmp_path / "out.ade", bundle)
    assert compress(open_source(folder), tmp_path / "out.ade", bundle).archive_bytes


@pytest.mark.parametrize("begin", [b"RIFF", b"\x89PNG"], ids=["WebP", "PNG"])
def test_pictures_whose_pixels_cannot_be_stored_are_stored_as_files(
    begin: bytes, folder: Path, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a large one, which takes longer to decode than is allowed, or whose WebP does."""

    def refuse(data: bytes) -> DecodedImage:
        if data.startswith(begin):
            raise SLOW
        return read_image(data)

    with monkeypatch.context() as patch:
        patch.setattr("extensions.codec.pictures.read_image", refuse)
        compress(open_source(folder), tmp_path / "out.ade", bundle)
    decompress.decompress(tmp_path / "out.ade", tmp_path / "back", bundle)
    for path in folder.rglob("*.png"):
        assert (tmp_path / "back" / path.relative_to(folder)).read_bytes() == path.read_bytes()


def test_a_large_scan_is_stored_as_a_file(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an attempt to decode it."""
    scan, out = tmp_path / "in" / "scan.png", tmp_path / "out.ade"
    scan.parent.mkdir()
    Image.new("L", (4001, 4000)).save(scan)
    monkeypatch.setattr("extensions.codec.pictures.read_image", None)
    compress(open_source(scan.parent), out, bundle)
    decompress.decompress(out, tmp_path / "back", bundle)
    assert (tmp_path / "back" / "scan.png").read_bytes() == scan.read_bytes()


def test_an_array_with_a_slow_image_is_no_bug(
    bundle: Bundle, small_images: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An array has no file to store in place of the image."""
    monkeypatch.setattr("extensions.codec.pictures.read_image", mock.Mock(side_effect=SLOW))
    source = save_array(tmp_path / "in.npy", small_images[:100])
    with pytest.raises(CodingError, match="more than 2 seconds to decode"):
        compress(source, tmp_path / "out.ade", bundle)


def test_a_calibration_is_not_needed(
    bundle: Bundle, small_images: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the bundle's own, which may be of another version, nor a named one."""
    copy = shutil.copytree(bundle.folder, tmp_path / "bundle")
    (copy / "calibration.npz").write_bytes(b"of another version")
    write_manifest(copy, bundle.manifest)
    monkeypatch.setattr(InferenceEngine, "calibrations", None)
    source = save_array(tmp_path / "in.npy", small_images[:100])
    figures = compress(source, tmp_path / "out.ade", open_bundle(copy)).figures
    assert figures.coded and figures.bound_bits


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.62, 0.999])
def test_an_interrupted_archive_is_resumed(
    archived: Path, bundle: Bundle, small_images: np.ndarray, tmp_path: Path, share: float
) -> None:
    """What kill -9 leaves is a prefix of the file: each chunk is on the disk before the next."""
    good = archived.read_bytes()
    length = int(share * len(good))
    whole = sum(c.count for c in chunks_of(archived) if c.offset + c.length <= length)
    archived.unlink()
    part = tmp_path / "out.ade.part"
    part.write_bytes(good[:length])
    report = compress(ArraySource(tmp_path / "in.npy"), archived, bundle, verify=False)
    assert report.resumed == whole and not part.exists()
    decompress.decompress(archived, tmp_path / "back.npy", bundle)
    assert np.array_equal(np.load(tmp_path / "back.npy"), small_images[:200])


def test_a_resumed_archive_reports_what_is_lost_and_keeps_its_verification(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compressing, "MAX_IMAGES", 2)
    (tmp_path / "in").mkdir()
    for i, image in enumerate(hard_images((8, 8, 3))):
        path = tmp_path / "in" / f"{i}.png"
        comment = PngInfo()
        comment.add_text("Comment", "a" * 500)
        Image.fromarray(image).save(path, pnginfo=comment)
    out = tmp_path / "out.ade"
    source = open_source(tmp_path / "in", False)
    count = compress(source, out, bundle).without_metadata
    middle = chunks_of(out)[1]
    part = tmp_path / "out.ade.part"
    part.write_bytes(out.read_bytes()[: middle.offset + middle.length])
    out.unlink()
    with pytest.raises(CodingError, match="other values of verified: remove it"):
        compress(source, out, bundle, verify=False)
    report = compress(source, out, bundle)
    assert report.resumed == 4 and report.without_metadata == count > 4


def test_images_that_do_not_come_back_take_no_room(tmp_path: Path) -> None:
    """A header may promise any number of them."""
    with decompress._array(tmp_path / "out.npy", 10**6) as rows:
        rows.write(5, None, Picture(np.full((8, 8, 3), 7, np.uint8)))
        rows.keep()
        rows.write(6, None, Picture(np.full((8, 8, 3), 8, np.uint8)))
        rows.undo()
    made = np.load(tmp_path / "out.npy", mmap_mode="r")
    assert made.shape == (10**6, 8, 8, 3)
    assert (made[5] == 7).all() and not made[6].any() and not made[-1].any()
    assert (tmp_path / "out.npy").stat().st_blocks * 512 < 2**20


@pytest.mark.parametrize("theirs", [b"a note", b"", archives.MAGIC, archives.MAGIC + b"another"])
def test_a_part_that_is_another_file_is_kept(
    archived: Path, bundle: Bundle, tmp_path: Path, theirs: bytes
) -> None:
    """Except for an empty one and the beginning of the same archive."""
    archived.unlink()
    part = tmp_path / "out.ade.part"
    part.write_bytes(theirs)
    source = ArraySource(tmp_path / "in.npy")
    if archives.MAGIC.startswith(theirs):
        assert compress(source, archived, bundle, verify=False).figures.images == 200
    else:
        with pytest.raises(CodingError, match="remove it, or take another name"):
            compress(source, archived, bundle, verify=False)
        assert part.read_bytes() == theirs and not archived.exists()


def test_a_part_of_other_images_is_refused(
    archived: Path, bundle: Bundle, small_images: np.ndarray, tmp_path: Path
) -> None:
    archived.rename(tmp_path / "new.ade.part")
    source = save_array(tmp_path / "other.npy", small_images[:120])
    with pytest.raises(CodingError, match="other values of images, input"):
        compress(source, tmp_path / "new.ade", bundle, verify=False)
    assert (tmp_path / "new.ade.part").exists()
    # The same shape, other pixels.
    source = save_array(tmp_path / "other.npy", 255 - small_images[:200])
    with pytest.raises(CodingError, match="have changed"):
        compress(source, tmp_path / "new.ade", bundle, verify=False)


@pytest.mark.parametrize(
    "names",
    [
        ["../a.png", "b.png"],
        ["/a.png", "b.png"],
        ["a.png", "a.png"],
        ["a.png", "a.png/b.png"],
        ["a.png", 1200 * "a/" + "b.png"],
    ],
)
def test_an_archive_writes_nothing_outside_its_folder(
    names: list[str], bundle: Bundle, small_images: np.ndarray, tmp_path: Path
) -> None:
    loaded = networks.Networks(bundle)
    coder = chunks.ChunkCoder(ImageCoder(loaded), loaded.image_shape)
    path = tmp_path / "evil.ade"
    with open(path, "w+b") as file:
        archives.write_header(file, header(bundle, 3))
        good, *_ = coder.encode(["good.png"], [Picture(small_images[0])])
        archives.write_chunk(file, 0, 1, good)
        evil, *_ = coder.encode(names, [Picture(image) for image in small_images[:2]])
        archives.write_chunk(file, 1, 2, evil)
        archives.write_end(file, 3)
    result = decompress.decompress(path, tmp_path / "back", bundle)
    assert result.lost == [range(1, 3)]
    assert [p.name for p in (tmp_path / "back").iterdir()] == ["good.png"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "evil.ade"]


def test_a_chunk_of_no_images_is_passed_over(
    bundle: Bundle, small_images: np.ndarray, tmp_path: Path
) -> None:
    loaded = networks.Networks(bundle)
    coder = chunks.ChunkCoder(ImageCoder(loaded), loaded.image_shape)
    path = tmp_path / "evil.ade"
    with open(path, "w+b") as file:
        archives.write_header(file, header(bundle, 1))
        good, *_ = coder.encode(["good.png"], [Picture(small_images[0])])
        archives.write_chunk(file, 0, 0, good)
        archives.write_chunk(file, 0, 1, good)
        archives.write_end(file, 1)
    result = decompress.decompress(path, tmp_path / "back", bundle)
    assert not result.lost
    assert [p.name for p in (tmp_path / "back").iterdir()] == ["good.png"]


def test_repeated_images_are_passed_over_and_what_follows_the_end_is_noticed(
    tmp_path: Path,
) -> None:
    fields = {"format_version": 1, "kind": "files", "images": 4, "image_shape": [8, 8, 3]}
    with open(tmp_path / "x.ade", "w+b") as file:
        archives.write_header(file, {**fields, "bundle": {}, "fingerprint": {}, "input": ""})
        for first in (0, 1, 2):
            archives.write_chunk(file, first, 2, b"content")
        archives.write_end(file, 4)
        found = archives.scan(file, tmp_path / "x.ade")
        assert [chunk.first for chunk in found.chunks] == [0, 2] and not found.lost()
        assert found.is_complete and found.is_intact
        file.seek(0, os.SEEK_END)
        file.write(b"more")
        found = archives.scan(file, tmp_path / "x.ade")
        assert found.is_complete and not found.is_intact and len(found.chunks) == 2


def test_a_part_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "theirs").write_text("kept")
    (tmp_path / "out.ade.part").symlink_to(tmp_path / "theirs")
    with pytest.raises(OSError):
        compressing._open_part(tmp_path / "out.ade.part")


def header(bundle: Bundle, images: int, kind: str = "files") -> dict[str, Any]:
    return {
        "format_version": 1,
        "kind": kind,
        "images": images,
        "image_shape": list(bundle.image_shape),
        "bundle": {"model": bundle.model_id, "codec": networks.codec_digest(bundle)},
        "fingerprint": networks.fingerprint(),
        "input": "",
    }


def test_hostile_chunks_are_damaged_chunks(bundle: Bundle, small_images: np.ndarray) -> None:
    """With valid checksums: whatever a chunk holds, decoding ends with images or ``Damaged``."""
    loaded = networks.Networks(bundle)
    coder = chunks.ChunkCoder(ImageCoder(loaded), loaded.image_shape)
    good, _, kinds = coder.encode(None, [Picture(image) for image in small_images[:40]])
    assert "m" in kinds
    generator = random.Random(0)
    refused = 0
    for _ in range(40):
        bad = bytearray(good)
        for _ in range(generator.choice((1, 3, 100))):
            bad[generator.randrange(len(bad))] = generator.randrange(256)
        if generator.random() < 0.3:
            del bad[generator.randrange(len(bad)) :]
        try:
            for _ in coder.decode(bytes(bad), 40):
                pass
        except Damaged:
            refused += 1
    assert refused == 40


def test_a_chunk_has_no_more_pixels_than_an_encoder_puts_into_it(
    bundle: Bundle, small_images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few kilobytes of WebP may hold hundreds of large images."""
    loaded = networks.Networks(bundle)
    coder = chunks.ChunkCoder(ImageCoder(loaded), loaded.image_shape)
    pictures = [Picture(image) for image in small_images[:2]]
    payload, _, kinds = coder.encode(None, pictures, use_model=False)
    assert kinds == "ww"
    size = pictures[0].num_bytes
    monkeypatch.setattr(chunks, "MAX_BYTES", size + 1)
    assert len(list(coder.decode(payload, 2))) == 2
    monkeypatch.setattr(chunks, "MAX_BYTES", size)
    decoded = coder.decode(payload, 2)
    next(decoded)
    with pytest.raises(Damaged, match="too many pixels"):
        next(decoded)


@pytest.mark.parametrize("suffix", ["bmp", "png"])
def test_a_small_archive_does_not_fill_the_disk(
    suffix: str, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = networks.Networks(bundle)
    coder = chunks.ChunkCoder(ImageCoder(loaded), loaded.image_shape)
    path, black = tmp_path / "bomb.ade", Picture(np.zeros((1000, 1000, 3), np.uint8))
    with open(path, "w+b") as file:
        archives.write_header(file, header(bundle, 2))
        for i in range(2):
            chunk, *_ = coder.encode([f"{i}.{suffix}"], [black], use_model=False)
            archives.write_chunk(file, i, 1, chunk)
        archives.write_end(file, 2)
    free = 5
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(total=100, free=free))
    decompress.decompress(path, tmp_path / "back", bundle)
    free = 4
    if suffix == "png":  # which is written as small as it was read
        decompress.decompress(path, tmp_path / "other", bundle)
        return
    with pytest.raises(CodingError, match="would fill the disk"):
        decompress.decompress(path, tmp_path / "other", bundle)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "bomb.ade"]


def test_text_of_an_archive_does_not_control_the_terminal(
    bundle: Bundle, small_images: np.ndarray, tmp_path: Path
) -> None:
    evil, path, said = "\x1b[2J", tmp_path / "evil.ade", []
    loaded = networks.Networks(bundle)
    coder = chunks.ChunkCoder(ImageCoder(loaded), loaded.image_shape)
    chunk, *_ = coder.encode([100 * evil], [Picture(None, b"a file with too long a name")])
    made_here = header(bundle, 1)
    for changed, reason in (
        ({"fingerprint": {**made_here["fingerprint"], "cpu": evil}}, "is too long here"),
        ({"bundle": {"model": evil, "codec": ""}}, "was made with the model"),
    ):
        with open(path, "w+b") as file:
            archives.write_header(file, {**made_here, **changed})
            archives.write_chunk(file, 0, 1, chunk)
            archives.write_end(file, 1)
        with pytest.raises(CodingError, match=reason) as refused:
            decompress.decompress(path, tmp_path / "back", bundle, said.append)
        said.append(str(refused.value))
    assert "cpu: '\\x1b" in said[0] and len(said) == 4
    assert all(line.isprintable() for line in said)


@pytest.mark.parametrize(
    "table",
    [
        {"kinds": "m" * 512},
        {"kinds": "f", "sizes": [10**18]},
        {"kinds": "f", "sizes": [-1]},
        {"kinds": "f", "sizes": [True]},
        {"kinds": "w", "sizes": [0], "paid": 5},
        {"kinds": "x", "sizes": [0]},
        {"kinds": "f", "sizes": [0], "names": [3]},
        {"kinds": "w", "sizes": [4], "grey": ["0"]},
        [],
        None,
    ],
)
def test_hostile_tables_are_refused(table: Any, bundle: Bundle) -> None:
    import zlib

    loaded = networks.Networks(bundle)
    coder = chunks.ChunkCoder(ImageCoder(loaded), loaded.image_shape)
    if isinstance(table, dict):
        table = {"names": None, "sizes": [], "paid": 0, "grey": [], **table}
    count = len(table["kinds"]) if isinstance(table, dict) else 1
    packed = zlib.compress(json.dumps(table).encode())
    payload = bytes(32) + chunks._LENGTHS.pack(len(packed), 2) + packed + b"\x01\0\0\x01" * 2
    with pytest.raises(Damaged):
        list(coder.decode(payload, count))
    bomb = zlib.compress(b" " * 2**25)
    payload = bytes(32) + chunks._LENGTHS.pack(len(bomb), 0) + bomb
    with pytest.raises(Damaged, match="too large"):
        list(coder.decode(payload, count))


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_codes_or_says_why_not(name: str) -> None:
    model = narrow(name).model
    about = {"recipe": name, "model": dataclasses.asdict(model)}
    if name == "av-ade-iaf-rd":
        with pytest.raises(CodecError, match=f"recipe {name} cannot code .* are autoregressive"):
            check_codable(about)
    else:
        check_codable(about)
    if name == "v-ade":  # tests here code with the model of av-ade
        assert model == narrow("av-ade").model


@pytest.mark.parametrize("name", ["gan", "gan-rd"])
def test_a_gan_without_an_inference_network_says_why_it_cannot_code(name: str) -> None:
    about = {"recipe": name, "model": dataclasses.asdict(narrow(name, inference_share=0.0).model)}
    with pytest.raises(CodecError, match=f"recipe {name} cannot code images: it has no inference"):
        check_codable(about)


def test_bundles_that_cannot_code_say_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = open_bundle(PRETRAINED).manifest
    plain = {name: value for name, value in manifest["files"].items() if "codec" not in name}
    sampler = Bundle(
        PRETRAINED, {**manifest, "recipe": "gan", "operations": ["sample"], "files": plain}
    )
    with pytest.raises(CodingError, match="recipe gan has no inference network"):
        networks.check_codec(sampler)
    bare = Bundle(PRETRAINED, {**manifest, "files": plain})
    with pytest.raises(CodingError, match="has no codec: give the bundle that made the archive"):
        networks.check_codec(bare)
    monkeypatch.setattr(sys, "argv", [".venv/bin/ade"])
    monkeypatch.setattr("extensions.codec.verbs.compress.open_bundle", lambda folder: bare)
    assert main(["compress", str(tmp_path), str(tmp_path / "out"), "--bundle", "mine"]) == 2
    copy = "mine has no codec. Make a copy with one: .venv/bin/ade export --with-codec mine OUT\n"
    assert capsys.readouterr().err == f"ade compress: {copy}"


def test_a_codec_of_another_version_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "old"
    shutil.copytree(bundle.folder, folder)
    program = json.loads((folder / "codec.json").read_text())
    (folder / "codec.json").write_text(json.dumps({**program, "format_version": 1}))
    write_manifest(folder, bundle.manifest)
    with pytest.raises(CodingError, match="format_version must be 2, got 1: export the bundle"):
        networks.Networks(open_bundle(folder))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), r"an array of uint8 .*, got float32 \(2, 8, 8, 3\)"),
        (np.zeros((2, 8, 8), np.uint8), r"an array of uint8 .*, got uint8 \(2, 8, 8\)"),
        (np.zeros((2, 8, 8, 4), np.uint8), "1 or 3 channels"),
        (np.zeros((0, 8, 8, 3), np.uint8), "in.npy holds no images"),
    ],
)
def test_arrays_that_are_no_images(array: np.ndarray, message: str, tmp_path: Path) -> None:
    with pytest.raises(CodingError, match=message):
        save_array(tmp_path / "in.npy", array)


@pytest.mark.filterwarnings("ignore:unclosed file")  # NumPy leaves it to the garbage collector
def test_sources_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(CodingError, match="holds no images"):
        open_source(tmp_path)
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(CodingError, match="neither a folder of images nor an array"):
        open_source(tmp_path / "a.txt")
    for content in (b"", b"text", b"PK\3\4"):
        (tmp_path / "a.npy").write_bytes(content)
        with pytest.raises(CodingError, match="a.npy is not an array"):
            open_source(tmp_path / "a.npy")
    with open(tmp_path / "a.npy", "wb") as file:
        np.savez(file, images=np.zeros((2, 8, 8, 3), np.uint8))
    with pytest.raises(CodingError, match="a.npy is not an array: it holds several arrays"):
        open_source(tmp_path / "a.npy")
    os.mkfifo(tmp_path / "pipe.npy")  # opening it would wait for a writer
    with pytest.raises(CodingError, match=r"pipe.npy must be a regular file"):
        open_source(tmp_path / "pipe.npy")


def test_an_array_that_is_cut_off_while_it_is_read(tmp_path: Path) -> None:
    """Mapped into memory, it would end the process."""
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    source = save_array(tmp_path / "a.npy", images)
    assert np.array_equal(source.read(2).pixels, images[2])
    os.truncate(tmp_path / "a.npy", 64 * 64 * 3)
    with pytest.raises(OSError, match="cut off while it was read"):
        source.read(2)
    columns = save_array(tmp_path / "b.npy", np.asfortranarray(images))
    assert np.array_equal(columns.read(1).pixels, images[1])


def test_a_file_that_can_be_opened_but_not_read_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later, the archive has its number: it would have to be made again."""
    for name in "ab":
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / f"{name}.png")

    def read(path: Path) -> bytes:
        if path.name == "a.png":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return path.read_bytes()

    monkeypatch.setattr("extensions.codec.sources.read_file", read)
    source = open_source(tmp_path)
    assert source.count == 1 and source.left_out == [(tmp_path / "a.png", "Input/output error")]


def test_what_an_archive_cannot_hold_is_refused_before_the_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "a").mkdir()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a" / "b\\c.png")
    deep = tmp_path / "deep" / (64 * "a/")
    deep.mkdir(parents=True)
    (deep / "b.png").touch()
    for folder in (tmp_path / "a", tmp_path / "deep"):
        with pytest.raises(CodingError, match="no backslash, .* at most 63 folders"):
            open_source(folder)
    assert open_source(tmp_path / "deep" / "a").count == 1
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    monkeypatch.setattr("extensions.codec.pictures.MAX_FILE_BYTES", 4000)
    with pytest.raises(CodingError, match=r"40 x 40 pixels .* can store 4,000"):
        Picture(noise).stored()
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    assert Picture(noise, file.getvalue()).stored()[0] in "wf"


def test_the_rate_with_initial_bits_is_of_the_images_that_pay_them() -> None:
    """They may have any size; that of files that are stored byte for byte is not known."""
    known = Figures(images=3, coded=2, initial=1, values=100, coded_bits=400, initial_bytes=50)
    for file, initial_values, said in (
        (0, 100, "(50 bytes) and names (0 bytes): 4.0000"),
        (1, 0, ""),
    ):
        figures = dataclasses.replace(known, initial_values=initial_values, initial_files=file)
        lines = [line for line in Report(figures).lines() if line.startswith("with initial bits")]
        assert len(lines) == 1 - file and said in "".join(lines)


def test_the_summary_counts_each_way_of_storing() -> None:
    first, *_ = Report(Figures(images=20, coded=8, initial=10, values=100)).lines()
    assert first.startswith("20 images: 8 coded by the model, 10 stored to start the coder")
    assert "2 stored because the model cannot code them" in first
    assert Report(Figures(images=1)).lines()[0].startswith("1 image: 0 coded")


def test_other_sizes_are_no_larger_than_webp(bundle: Bundle, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    compress(save_array(tmp_path / "in.npy", images), tmp_path / "out.ade", bundle)
    webp = 0
    for image in images:
        out = io.BytesIO()
        Image.fromarray(image).save(out, "WEBP", lossless=True, method=4, quality=100)
        webp += out.tell()
    assert (tmp_path / "out.ade").stat().st_size < webp + 2 * 1200  # a header and its copy
    decompress.decompress(tmp_path / "out.ade", tmp_path / "back.npy", bundle)
    assert np.array_equal(np.load(tmp_path / "back.npy"), images)


@pytest.mark.slow
def test_a_codec_is_added_to_a_bundle(tmp_path: Path) -> None:
    words = ["export", str(PRETRAINED), str(tmp_path / "with"), "--with-codec"]
    assert main(words) == 0
    found, before = open_bundle(tmp_path / "with"), open_bundle(PRETRAINED)
    assert {**found.manifest, "files": None} == {**before.manifest, "files": None}
    assert before.manifest["files"].items() <= found.manifest["files"].items()
    with pytest.raises(ValueError, match="exists"):
        add_graphs(PRETRAINED, tmp_path / "with", ["codec"], ValueError)


@pytest.mark.slow
def test_killed_at_random_moments(bundle: Bundle, small_images: np.ndarray, tmp_path: Path) -> None:
    images = np.concatenate([small_images] * 3)
    np.save(tmp_path / "in.npy", images)
    out, part = tmp_path / "out.ade", tmp_path / "out.ade.part"
    script = (
        "import sys; from extensions.codec import compress; compress.MAX_IMAGES = 40\n"
        "from ade_cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    words = ["compress", str(tmp_path / "in.npy"), str(out), "--bundle", str(bundle.folder)]
    command = [sys.executable, "-c", script, *words]
    generator, before = random.Random(0), 0
    for _ in range(4):
        process = subprocess.Popen(command, cwd=ROOT)
        least = before + generator.randrange(10_000, 30_000)
        while process.poll() is None and not (part.exists() and part.stat().st_size >= least):
            time.sleep(0.01)
        process.kill()
        process.wait()
        if out.exists():
            break
        back = tmp_path / "part.npy"
        found = decompress.decompress(part, back, bundle)
        # It may be whole: killed before it had its name.
        assert found.is_truncated or found.restored == len(images)
        assert found.restored > 0
        rows = np.load(back)[: found.restored]
        assert np.array_equal(rows, images[: len(rows)])
        back.unlink()
        before = part.stat().st_size
    if not out.exists():
        subprocess.run(command, cwd=ROOT, check=True)
    decompress.decompress(out, tmp_path / "back.npy", bundle)
    assert np.array_equal(np.load(tmp_path / "back.npy"), images)


def test_a_bundle_with_a_codec_has_no_other_files(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))
    (copy / "features.onnx").write_bytes(b"not listed")
    monkeypatch.setattr("extensions.codec.graphs.write_codec", lambda model, folder: None)
    add_graphs(copy, tmp_path / "new", ["codec"], ValueError)
    assert verify_bundle(tmp_path / "new").manifest == open_bundle(copy).manifest


def test_images_are_not_decoded_for_a_model_without_a_codec(
    small_images: np.ndarray,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("training.datasets.folder.decode_into", None)
    folder = make_folder(tmp_path / "images", small_images[:10])
    config = narrow("av-ade-iaf-rd")
    save_model(ADEModel(config.model), tmp_path, {"recipe": config.recipe})
    words = ["export", str(tmp_path), str(tmp_path / "out"), "--data", str(folder)]
    assert main([*words, "--with-codec"]) == 2
    assert "its posteriors are autoregressive" in capsys.readouterr().err
