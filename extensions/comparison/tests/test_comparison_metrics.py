"""Metrics of the comparison against closed forms and images with a known result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from extensions.comparison import inception
from extensions.comparison.inception_score import inception_score
from extensions.comparison.kid import kernel_distance
from extensions.comparison.measure import MeasureOptions, Measurer
from extensions.comparison.prd import prd_curve, prd_f_scores
from extensions.comparison.resnet20 import ResNet20, features_of
from tests.helpers import large_data, make_model, needs_data
from training.data import Dataset, ImageSet
from training.metrics.features import FeatureError
from training.metrics.frechet import frechet_distance

RESNET20 = "models/resnet20_cifar10.npz"


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "w.npz", a=np.zeros(3))
    with pytest.raises(FeatureError, match="does not hold a ResNet-20"):
        ResNet20(tmp_path / "w.npz")


def test_the_fid_uses_as_many_held_out_images_as_requested(
    small_images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def features(weights: str, images: np.ndarray, device: torch.device) -> Any:
        seen.append(len(images))
        return images.reshape(len(images), -1)[:, :4].astype(float), np.zeros((len(images), 10))

    monkeypatch.setattr("extensions.comparison.measure.verified_inception", lambda weights: None)
    monkeypatch.setattr("extensions.comparison.measure.inception_features", features)
    monkeypatch.setattr("extensions.comparison.measure.FID_COUNTS", (30, 60, 90))
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

    monkeypatch.setattr("extensions.comparison.measure.efficientnet_weights", lambda: None)
    monkeypatch.setattr("extensions.comparison.measure.EfficientNetFeatures", lambda: features)
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
