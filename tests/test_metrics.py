"""Metrics against closed forms, reference implementations and images with a known result."""

import numpy as np
import pytest
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

import training.measure
from ade_base.panel import PANEL, RELATIVE, panel_rows
from ade_base.pictures.show import psnr
from serving.engine.manifest import MANIFEST, check_types
from tests.helpers import make_model
from training.data import Dataset, ImageSet
from training.metrics.efficientnet import EfficientNetFeatures, _conv, _fold
from training.metrics.features import FeatureError, RandomConvolutions
from training.metrics.frechet import frechet_distance, is_rank_deficient
from training.metrics.gan_train import gan_train_accuracy
from training.metrics.precision_recall import improved_precision_recall


def test_frechet_distance_of_independent_gaussians():
    rng = np.random.default_rng(0)
    scales_a, scales_b, shift = (
        np.array([1.0, 2.0, 0.5]),
        np.array([2.0, 1.0, 0.5]),
        np.array([1.0, 0.0, -2.0]),
    )
    a, b = rng.normal(0, scales_a, (200_000, 3)), rng.normal(shift, scales_b, (200_000, 3))
    expected = np.square(shift).sum() + np.square(scales_a - scales_b).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=0.01)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_does_not_depend_on_the_basis():
    rng = np.random.default_rng(1)
    a, b = rng.normal(0, 1, (500, 4)) * [1, 2, 3, 4], rng.normal(1, 2, (400, 4))
    rotation, _ = np.linalg.qr(rng.normal(size=(4, 4)))
    assert frechet_distance(a @ rotation, b @ rotation) == pytest.approx(
        frechet_distance(a, b), rel=1e-6
    )


def test_shapes_are_checked():
    with pytest.raises(ValueError, match="must be"):
        frechet_distance(np.zeros((5, 3)), np.zeros((5, 4)))


def test_frechet_distance_is_the_librarys():
    rng = np.random.default_rng(2)
    a, b = rng.normal(0, 1, (600, 6)) @ rng.normal(size=(6, 6)), rng.normal(0.3, 2, (500, 6))
    library = fid_statistics_to_metric(
        fid_features_to_statistics(torch.from_numpy(a)),
        fid_features_to_statistics(torch.from_numpy(b)),
        False,
    )
    assert frechet_distance(a, b) == pytest.approx(library["frechet_inception_distance"], rel=1e-6)


def test_too_few_images_make_covariances_singular():
    rows = np.zeros((9, 4))
    assert not is_rank_deficient(rows, rows[:5])
    assert is_rank_deficient(rows, rows[:4]) and is_rank_deficient(rows[:4], rows)


def test_improved_precision_and_recall():
    rng = np.random.default_rng(4)
    both = rng.normal(size=(400, 4))
    assert improved_precision_recall(both, both) == (1, 1)
    assert improved_precision_recall(both + 100, both) == (0, 0)
    precision, recall = improved_precision_recall(0.1 * both, both)
    assert precision > 0.9 and recall < 0.5
    # On a line, by hand: each real point reaches its third neighbour, the samples theirs.
    real, samples = np.arange(5.0)[:, None], np.array([[0.0], [0.1], [0.2], [0.3], [9.0]])
    assert improved_precision_recall(samples, real) == (0.8, 1.0)
    with pytest.raises(ValueError, match="with more than 3 rows"):
        improved_precision_recall(both, both[:100])


class Pixels:
    """A feature space whose distances have a closed form: the first pixel's values."""

    def __init__(self, *given, **named):
        pass

    def __call__(self, images):
        return images[:, 0, 0].astype(float)


def panel_data(labels):
    """Held-out and training images, equal, and as many samples, which are brighter by 5."""
    images = np.random.default_rng(0).integers(0, 200, (120, 8, 8, 3), dtype=np.uint8)
    part = ImageSet(images, np.arange(120) % 2 if labels else None)
    parts = {"train": part, "select": part, "test": part.slice(0, 50)}
    return Dataset("d", parts, {name: name for name in parts}), images + 5


def test_the_panel_of_known_samples(monkeypatch):
    """Identical sets have no excess, and a shifted Gaussian has the square of its shift."""
    dataset, shifted = panel_data(labels=True)
    drawn = {"mean": shifted, "density": shifted - 5}
    monkeypatch.setattr("training.measure.EfficientNetFeatures", Pixels)
    monkeypatch.setattr(
        "training.measure.sample_images",
        lambda model, n, device, noise, seed: drawn["density" if noise else "mean"][:n],
    )
    measurer = training.measure.Measurer(dataset, torch.device("cpu"))
    about = {"recipe": "av-ade", "operations": ["sample", "score"]}
    result = measurer.measure(make_model(), about)
    check_types({"select": result}, MANIFEST["evaluation"], "evaluation")  # a bundle may hold it
    figures = result["figures"]
    assert figures.keys() == {measure.name for measure in PANEL}
    assert figures["lite2"]["value"] == pytest.approx(3 * 5**2, rel=1e-6)
    assert figures["lite2"]["distance_of_real"] == pytest.approx(0, abs=1e-6)
    for name in ("density_lite2", "density_random"):
        assert figures[name]["value"] == pytest.approx(0, abs=1e-4)
    assert figures["random"]["value"] > 0
    assert 0 <= figures["gan_train"]["value"] <= 1 and figures["gan_train"]["samples"] == 120
    assert "note" not in figures["lite2"]
    rows = {title: (text, note) for title, text, note in panel_rows(figures)}
    assert rows["excess Fréchet distance, EfficientNet-Lite2 (lower is better)"][0] == "75.0"
    guided = measurer.measure(make_model(), {**about, "recipe": "av-ade-pd"})["figures"]
    assert {name for name, its in guided.items() if its.get("note") == RELATIVE} == {
        "lite2",
        "density_lite2",
        "precision",
        "recall",
        "gan_train",
    }


def test_the_panel_says_what_cannot_be_measured(monkeypatch):
    dataset, _ = panel_data(labels=False)
    cpu = torch.device("cpu")
    final = training.measure.Measurer(dataset, cpu, "test").measure(make_model(), {})["figures"]
    assert final["lite2"] == {
        "value": None,
        "note": "needs 100 held-out and training images, has 50",
    }
    assert final["bpd"]["images"] == 50 and final["bpd"]["error"] > 0

    def missing(**named):
        raise FeatureError("EfficientNet's weights need the package x")

    monkeypatch.setattr("training.measure.EfficientNetFeatures", missing)
    figures = training.measure.Measurer(dataset, cpu).measure(
        make_model(), {"operations": ["sample"]}
    )
    found = figures["figures"]
    assert found["recall"]["note"] == "EfficientNet's weights need the package x"
    assert found["bpd"] == {"value": None, "note": "the model has no likelihood"}
    assert found["random"]["value"] is not None
    assert found["density_random"]["note"] == "the model has no density samples"


def test_random_convolutions_depend_on_nothing_but_the_image():
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    first, again = (RandomConvolutions(torch.device("cpu"))(images) for _ in range(2))
    assert first.shape == (3, 512) and np.array_equal(first, again)
    assert np.allclose(first[1:2], RandomConvolutions(torch.device("cpu"))(images[1:2]))


def test_gan_train_learns_what_the_samples_show():
    rng = np.random.default_rng(6)
    classes = rng.integers(0, 3, 600)
    images = (
        rng.integers(0, 60, (600, 8, 8, 3)) + 120 * np.eye(3, dtype=int)[classes][:, None, None]
    )
    images = images.astype(np.uint8)
    device = torch.device("cpu")
    assert (
        gan_train_accuracy(images[:400], classes[:400], images[400:], classes[400:], device) > 0.95
    )
    shuffled = rng.permutation(classes[:400])
    assert gan_train_accuracy(images[:400], shuffled, images[400:], classes[400:], device) < 0.7


def test_psnr():
    image = np.full((2, 2, 3), 100, np.uint8)
    one_off = image.copy()
    one_off[0, 0, 0] += 1
    assert psnr(image, image) is None
    assert psnr(image, image + 10) == pytest.approx(10 * np.log10(255**2 / 100))
    assert psnr(image, one_off) == pytest.approx(10 * np.log10(255**2 * 12))
    with pytest.raises(ValueError, match="must have one shape"):
        psnr(image, one_off[:1])


def test_batch_normalisation_is_folded_into_convolutions():
    torch.manual_seed(0)
    conv, norm = (
        torch.nn.Conv2d(4, 6, 3, padding=1, bias=False),
        torch.nn.BatchNorm2d(6, eps=1e-3).eval(),
    )
    for value in (norm.weight, norm.bias, norm.running_mean):
        value.data = torch.randn(6)
    norm.running_var.data = torch.rand(6) + 0.5
    state = {f"c.{k}": v for k, v in conv.state_dict().items()} | {
        f"n.{k}": v for k, v in norm.state_dict().items()
    }
    x = torch.randn(2, 4, 9, 9)
    assert torch.allclose(_conv(_fold(state, "c", "n"), x), norm(conv(x)), atol=1e-5)


@pytest.mark.slow
def test_efficientnet_tells_images_from_noise(real_images):
    features = EfficientNetFeatures()
    real = features(real_images[:120])
    assert real.shape == (120, 1280)
    noise = features(np.random.default_rng(0).integers(0, 256, (60, 32, 32, 3), dtype=np.uint8))
    assert frechet_distance(real[:60], noise) > 2 * frechet_distance(real[:60], real[60:])
    assert np.allclose(features(real_images[7:9]), real[7:9], atol=1e-3)  # whatever the neighbours
