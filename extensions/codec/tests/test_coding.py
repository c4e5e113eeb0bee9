"""Lossless coding: every step is exact, archives come back, and damage is contained."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("constriction")

from ade_cli.main import main
from ade_model.checkpoint import load_model, save_model
from ade_model.model import ADEModel
from export.write import add_graphs
from extensions.codec import lattice, networks
from extensions.codec.errors import CodingError, Damaged, NotCoded
from extensions.codec.graphs import CodecError, check_codable
from extensions.codec.image_coder import ImageCoder
from extensions.codec.lifting import COEFFICIENT_BITS, factorize
from extensions.codec.stack import Stack
from extensions.codec.tests.models import (
    CONFIGS,
    hard_images,
    log_weights,
    make_bundle,
    random_words,
)
from serving.engine.bundle import Bundle, open_bundle, verify_bundle, write_manifest
from tests.helpers import PRETRAINED, make_folder, narrow
from training.recipes import recipe_names


@pytest.fixture(scope="module", params=list(CONFIGS))
def coded(request, bundle, tmp_path_factory, small_images):
    name = request.param
    if name != "av-ade":
        folder = tmp_path_factory.mktemp(name) / name
        bundle = make_bundle(folder, name, small_images, scores=False)
    return ImageCoder(networks.Networks(bundle)), load_model(bundle.folder)


@pytest.mark.parametrize("n", [2, 3, 12, 48])
def test_lifting_steps_are_the_rotation_and_exact(n):
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


def test_a_matrix_that_is_not_orthogonal_has_no_lifting_steps():
    with pytest.raises(ValueError, match="not orthogonal"):
        factorize(np.ones((3, 3)))


@pytest.mark.parametrize("scale", [0.01, 0.7, 12.0, 1000.0])
def test_stretching_is_exact_and_costs_its_log_determinant(scale):
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


def test_a_stack_stores_any_value_and_gives_its_bits_back():
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
def test_a_stack_refuses_what_would_end_the_process(mean, scale):
    stack = Stack(random_words(8), sealed=True)
    for call in (stack.draw_gaussian, stack.pop_gaussian):
        with pytest.raises(NotCoded):
            call(np.array([mean], float), np.array([scale], float))
    with pytest.raises(NotCoded):
        stack.pop_uniform(np.array([1]))


def test_every_image_comes_back(coded, small_images):
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


def test_the_net_rate_is_the_bound(coded, small_images):
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


def test_no_source_is_coded_below_its_entropy(coded):
    """Of uniform noise that is 8 bits per value, whatever the model (Shannon, 1948)."""
    coder, model = coded
    shape = (100, model.config.image_size, model.config.image_size, model.config.channels)
    stack = Stack(random_words(3000, seed=2), sealed=True)
    before = stack.bits
    for image in np.random.default_rng(3).integers(0, 256, shape, np.uint8):
        coder.encode(image, stack)
    assert stack.bits - before > 8 * np.prod(shape)


def test_all_images_of_a_tiny_alphabet_can_be_coded(bundle):
    """Exhaustive where that is possible: every value of one pixel in every channel."""
    coder = ImageCoder(networks.Networks(bundle))
    words = random_words(1500)
    for level in range(256):
        image = np.full((8, 8, 3), 90, np.uint8)
        image[4, 3, level % 3] = level
        stack = Stack(words, sealed=True)
        coder.encode(image, stack)
        assert np.array_equal(coder.decode(stack), image)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_codes_or_says_why_not(name):
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
def test_a_gan_without_an_inference_network_says_why_it_cannot_code(name):
    about = {"recipe": name, "model": dataclasses.asdict(narrow(name, inference_share=0.0).model)}
    with pytest.raises(CodecError, match=f"recipe {name} cannot code images: it has no inference"):
        check_codable(about)


def test_bundles_that_cannot_code_say_why(tmp_path, monkeypatch, capsys):
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


def test_a_codec_of_another_version_is_refused(bundle, tmp_path):
    folder = tmp_path / "old"
    shutil.copytree(bundle.folder, folder)
    program = json.loads((folder / "codec.json").read_text())
    (folder / "codec.json").write_text(json.dumps({**program, "format_version": 1}))
    write_manifest(folder, bundle.manifest)
    with pytest.raises(CodingError, match="format_version must be 2, got 1: export the bundle"):
        networks.Networks(open_bundle(folder))


@pytest.mark.slow
def test_a_codec_is_added_to_a_bundle(tmp_path):
    words = ["export", str(PRETRAINED), str(tmp_path / "with"), "--with-codec"]
    assert main(words) == 0
    found, before = open_bundle(tmp_path / "with"), open_bundle(PRETRAINED)
    assert {**found.manifest, "files": None} == {**before.manifest, "files": None}
    assert before.manifest["files"].items() <= found.manifest["files"].items()
    with pytest.raises(ValueError, match="exists"):
        add_graphs(PRETRAINED, tmp_path / "with", ["codec"], ValueError)


def test_a_bundle_with_a_codec_has_no_other_files(tiny_bundle, tmp_path, monkeypatch):
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))
    (copy / "features.onnx").write_bytes(b"not listed")
    monkeypatch.setattr("extensions.codec.graphs.write_codec", lambda model, folder: None)
    add_graphs(copy, tmp_path / "new", ["codec"], ValueError)
    assert verify_bundle(tmp_path / "new").manifest == open_bundle(copy).manifest


def test_images_are_not_decoded_for_a_model_without_a_codec(
    small_images, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("training.datasets.folder.decode_into", None)
    folder = make_folder(tmp_path / "images", small_images[:10])
    config = narrow("av-ade-iaf-rd")
    save_model(ADEModel(config.model), tmp_path, {"recipe": config.recipe})
    words = ["export", str(tmp_path), str(tmp_path / "out"), "--data", str(folder)]
    assert main([*words, "--with-codec"]) == 2
    assert "its posteriors are autoregressive" in capsys.readouterr().err
