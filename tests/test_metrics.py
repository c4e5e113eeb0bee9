"""Metrics against closed forms, reference implementations and images with a known result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from ade_base.pictures.show import psnr
from tests.helpers import large_data, make_model, needs_data
from training.data import Dataset, ImageSet
from training.measure import MeasureOptions, Measurer
from training.metrics import inception
from training.metrics.efficientnet import EfficientNetFeatures, _conv, _fold
from training.metrics.features import FeatureError, ResNet20, features_of
from training.metrics.frechet import frechet_distance, is_rank_deficient
from training.metrics.gan_train import gan_train_accuracy
from training.metrics.inception_score import inception_score
from training.metrics.kid import kernel_distance
from training.metrics.precision_recall import improved_precision_recall, prd_curve, prd_f_scores

RESNET20 = "models/resnet20_cifar10.npz"


def test_frechet_distance_of_independent_gaussians() -> None:
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


def test_frechet_distance_does_not_depend_on_the_basis() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(0, 1, (500, 4)) * [1, 2, 3, 4], rng.normal(1, 2, (400, 4))
    rotation, _ = np.linalg.qr(rng.normal(size=(4, 4)))
    assert frechet_distance(a @ rotation, b @ rotation) == pytest.approx(
        frechet_distance(a, b), rel=1e-6
    )


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="must be"):
        frechet_distance(np.zeros((5, 3)), np.zeros((5, 4)))


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "w.npz", a=np.zeros(3))
    with pytest.raises(FeatureError, match="does not hold a ResNet-20"):
        ResNet20(tmp_path / "w.npz")


def test_frechet_distance_is_the_librarys() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.normal(0, 1, (600, 6)) @ rng.normal(size=(6, 6)), rng.normal(0.3, 2, (500, 6))
    library = fid_statistics_to_metric(
        fid_features_to_statistics(torch.from_numpy(a)),
        fid_features_to_statistics(torch.from_numpy(b)),
        False,
    )
    assert frechet_distance(a, b) == pytest.approx(library["frechet_inception_distance"], rel=1e-6)


def test_too_few_images_make_covariances_singular() -> None:
    rows = np.zeros((9, 4))
    assert not is_rank_deficient(rows, rows[:5])
    assert is_rank_deficient(rows, rows[:4]) and is_rank_deficient(rows[:4], rows)


def test_the_fid_uses_as_many_held_out_images_as_requested(
    small_images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def features(weights: str, images: np.ndarray, device: torch.device) -> Any:
        seen.append(len(images))
        return images.reshape(len(images), -1)[:, :4].astype(float), np.zeros((len(images), 10))

    monkeypatch.setattr("training.measure.verified_inception", lambda weights: None)
    monkeypatch.setattr("training.measure.inception_features", features)
    monkeypatch.setattr("training.measure.FID_COUNTS", (30, 60, 90))
    parts = {name: ImageSet(small_images[:90]) for name in ("train", "test")}
    dataset = Dataset("d", parts, {name: name for name in parts})
    options = MeasureOptions(images=40, inception="weights")
    measurer = Measurer(dataset, torch.device("cpu"), options)
    found = measurer.measure(make_model(), {"operations": ["sample"]})["inception"]["fid"]
    assert [figure["reference"] for figure in found.values()] == [
        "40 images of test",
        "40 images of test",
        "90 images of train",
    ]
    assert seen == [90, 40, 90]  # samples, held-out images once, training images


def test_no_density_samples_are_drawn_for_efficientnet_alone(
    small_images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    def features(images: np.ndarray) -> np.ndarray:
        return images.reshape(len(images), -1)[:, :4].astype(float)

    monkeypatch.setattr("training.measure.efficientnet_weights", lambda: None)
    monkeypatch.setattr("training.measure.EfficientNetFeatures", lambda: features)
    dataset = Dataset("d", {"test": ImageSet(small_images[:30])}, {"test": "test"})
    options = MeasureOptions(draws=1, efficientnet=True, efficientnet_samples=30)
    said: list[str] = []
    measurer = Measurer(dataset, torch.device("cpu"), options, said.append)
    found = measurer.measure(make_model(), {"operations": ["sample", "score"]})
    assert found["distances"].keys() == {"mean"}
    assert "30 mean samples" in said and "30 density samples" not in said


def test_inception_score_of_known_classes() -> None:
    sure = np.eye(10)[np.arange(1000) % 10] * 100
    assert inception_score(sure, splits=1)["mean"] == pytest.approx(10)  # ten classes, each certain
    assert inception_score(sure[::10])["mean"] == pytest.approx(1)  # one class
    assert inception_score(np.zeros((100, 10)))["mean"] == pytest.approx(1)  # no idea
    with pytest.raises(ValueError, match="at least 10 rows"):
        inception_score(np.zeros((5, 10)))


def test_kernel_distance_is_unbiased_and_sees_a_shift() -> None:
    rng = np.random.default_rng(3)
    a, b, c = (rng.normal(shift, 1, (1500, 8)) for shift in (0, 0, 1))
    assert abs(kernel_distance(a, b)["mean"]) < 4 * kernel_distance(a, b)["std"]
    assert kernel_distance(c, a)["mean"] > 1
    small, other = a[:40], c[:30]
    kernel = lambda x, y: (x @ y.T / 8 + 1) ** 3
    off = lambda k: (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))
    exact = (
        off(kernel(small[:30], small[:30]))
        + off(kernel(other, other))
        - 2 * kernel(small[:30], other).mean()
    )
    assert kernel_distance(small[:30], other)["mean"] == pytest.approx(exact, rel=1e-6)
    with pytest.raises(ValueError, match="must be"):
        kernel_distance(a, a[:, :3])


def test_improved_precision_and_recall() -> None:
    rng = np.random.default_rng(4)
    both = rng.normal(size=(400, 4))
    assert (
        improved_precision_recall(both, both)["precision"]
        == improved_precision_recall(both, both)["recall"]
        == 1
    )
    far = improved_precision_recall(both + 100, both)
    assert far["precision"] == far["recall"] == 0
    samples = rng.normal(size=(400, 4))
    few = improved_precision_recall(samples, both[:100])
    assert few["images"] == 100 and abs(few["precision"] - few["recall"]) < 0.15
    assert few == improved_precision_recall(samples[:100], both[:100])
    narrow = improved_precision_recall(0.1 * both, both)
    assert narrow["precision"] > 0.9 and narrow["recall"] < 0.5


def test_prd_of_known_histograms() -> None:
    real = np.full(4, 0.25)
    precision, recall = prd_curve(real, real)
    assert max(np.minimum(precision, recall)) == pytest.approx(1, abs=1e-3)
    half = np.array([0.5, 0.5, 0, 0])  # all it makes is real, of half the kinds
    precision, recall = prd_curve(half, real)
    assert precision.max() == pytest.approx(1, abs=1e-3) and recall.max() == pytest.approx(
        0.5, abs=1e-3
    )
    rng = np.random.default_rng(5)
    modes = 20 * rng.normal(size=(8, 5))
    draw = lambda count: modes[rng.integers(0, count, 2000)] + rng.normal(size=(2000, 5))
    everything, few = prd_f_scores(draw(8), draw(8)), prd_f_scores(draw(2), draw(8))
    assert everything["f8"] > 0.95 and everything["f1_8"] > 0.95
    assert few["f1_8"] > 0.9 and few["f8"] < 0.35


def test_gan_train_learns_what_the_samples_show() -> None:
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


def test_psnr() -> None:
    image = np.full((2, 2, 3), 100, np.uint8)
    one_off = image.copy()
    one_off[0, 0, 0] += 1
    assert psnr(image, image) is None
    assert psnr(image, image + 10) == pytest.approx(10 * np.log10(255**2 / 100))
    assert psnr(image, one_off) == pytest.approx(10 * np.log10(255**2 * 12))
    with pytest.raises(ValueError, match="must have one shape"):
        psnr(image, one_off[:1])


@pytest.mark.slow
@needs_data("data/cifar10", RESNET20)
def test_resnet20_tells_images_from_noise(tmp_path: Path) -> None:
    from training.datasets import load_dataset

    part = load_dataset("cifar10", str(large_data("data/cifar10"))).parts["test"]
    network, device = ResNet20(large_data(RESNET20)), torch.device("cpu")
    features = features_of(network, part.images[:8000], device)
    assert (network.logits(features).argmax(1) == part.labels[:8000]).mean() > 0.91
    with np.load(large_data(RESNET20)) as arrays:
        weights = dict(arrays)
    np.savez(tmp_path / "copy.npz", **dict(reversed(weights.items())))
    np.savez(tmp_path / "other.npz", **(weights | {"linear.bias": weights["linear.bias"] + 1}))
    assert ResNet20(tmp_path / "copy.npz").digest == network.digest
    assert ResNet20(tmp_path / "other.npz").digest != network.digest
    assert frechet_distance(features[:4000], features[4000:]) == pytest.approx(0.1, abs=0.05)
    noise = np.random.default_rng(0).integers(0, 256, (2000, 32, 32, 3), dtype=np.uint8)
    assert frechet_distance(features[:4000], features_of(network, noise, device)) > 50


def test_batch_normalisation_is_folded_into_convolutions() -> None:
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
def test_efficientnet_tells_images_from_noise(real_images: np.ndarray) -> None:
    features = EfficientNetFeatures()
    real = features(real_images[:120])
    assert real.shape == (120, 1280)
    noise = features(np.random.default_rng(0).integers(0, 256, (60, 32, 32, 3), dtype=np.uint8))
    assert frechet_distance(real[:60], noise) > 2 * frechet_distance(real[:60], real[60:])
    assert np.allclose(features(real_images[7:9]), real[7:9], atol=1e-3)  # whatever the neighbours


@pytest.mark.slow
def test_inception_is_loaded_by_its_hash_alone(
    tmp_path: Path, real_images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uses random weights in the library's format: everything is tested except for the values."""
    from torch_fidelity import feature_extractor_inceptionv3 as library

    monkeypatch.setattr(library, "load_state_dict_from_url", lambda *a, **k: {})
    monkeypatch.setattr(
        library.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None
    )
    network = library.FeatureExtractorInceptionV3("x", ["2048"])
    monkeypatch.undo()
    path = tmp_path / "weights.pth"
    torch.save(network.state_dict(), path)
    with pytest.raises(
        FeatureError, match="is not the FID's Inception: SHA-256 should be 6726825d"
    ):
        inception.inception_features(str(path), real_images[:2], torch.device("cpu"))
    with pytest.raises(FeatureError, match="there is no file"):
        inception.inception_features(str(tmp_path / "none"), real_images[:2], torch.device("cpu"))
    import hashlib

    monkeypatch.setattr(inception, "WEIGHTS_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    pooled, logits = inception.inception_features(str(path), real_images[:3], torch.device("cpu"))
    assert pooled.shape == (3, 2048) and logits.shape == (3, 1008) and np.isfinite(pooled).all()
