"""Metrics of the comparison against closed forms and images with a known result."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from extensions.comparison import inception
from extensions.comparison.measure import MeasureOptions, Measurer
from extensions.comparison.resnet20 import ResNet20, features_of
from extensions.comparison.rows import EFFICIENTNET, INCEPTION
from tests.helpers import large_data, make_model, needs_data
from training.data import Dataset, ImageSet
from training.metrics.features import FeatureError
from training.metrics.frechet import frechet_distance

WEIGHTS = "models/resnet20_cifar10.npz"


def test_weights_of_another_network_are_refused(tmp_path):
    np.savez(tmp_path / "w.npz", a=np.zeros(3))
    with pytest.raises(FeatureError, match="does not hold a ResNet-20"):
        ResNet20(tmp_path / "w.npz")


def features(images):
    return images.reshape(len(images), -1)[:, :4].astype(float)


def test_the_fid_is_of_training_images(small_images, monkeypatch):
    seen = []

    def of_inception(weights, images, device):
        seen.append(len(images))
        return features(images)

    monkeypatch.setattr("extensions.comparison.measure.verified_inception", lambda weights: None)
    monkeypatch.setattr("extensions.comparison.measure.inception_features", of_inception)
    monkeypatch.setattr("extensions.comparison.measure.FID_IMAGES", 70)
    parts = {"train": ImageSet(small_images[:90]), "test": ImageSet(small_images[:40])}
    dataset = Dataset("d", parts, {name: name for name in parts})
    measurer = Measurer(dataset, torch.device("cpu"), MeasureOptions(inception="weights"))
    for _ in range(2):
        found = measurer.measure(make_model(), {"operations": ["sample"]}).distances[INCEPTION]
    assert found.reference == "70 images of train" and found.samples == 70
    assert seen == [70, 70, 70]  # training images once, samples of each model


def test_no_density_samples_are_drawn_for_efficientnet_alone(small_images, monkeypatch):
    monkeypatch.setattr("extensions.comparison.measure.efficientnet_weights", lambda: None)
    monkeypatch.setattr("extensions.comparison.measure.EfficientNetFeatures", lambda: features)
    dataset = Dataset("d", {"test": ImageSet(small_images[:30])}, {"test": "test"})
    options = MeasureOptions(draws=1, efficientnet=True, samples=60)
    said = []
    measurer = Measurer(dataset, torch.device("cpu"), options, said.append)
    found = measurer.measure(make_model(), {"operations": ["sample", "score"]})
    assert found.distances.keys() == {EFFICIENTNET} and found.density is None
    assert "30 mean samples" in said and "30 density samples" not in said


@pytest.mark.slow
@needs_data("data/cifar10", WEIGHTS)
def test_resnet20_tells_images_from_noise(tmp_path):
    from training.datasets import load_dataset

    part = load_dataset("cifar10", str(large_data("data/cifar10"))).parts["test"]
    network, device = ResNet20(large_data(WEIGHTS)), torch.device("cpu")
    features = features_of(network, part.images[:8000], device)
    assert (network.logits(features).argmax(1) == part.labels[:8000]).mean() > 0.91
    with np.load(large_data(WEIGHTS)) as arrays:
        weights = dict(arrays)
    np.savez(tmp_path / "copy.npz", **dict(reversed(weights.items())))
    np.savez(tmp_path / "other.npz", **(weights | {"linear.bias": weights["linear.bias"] + 1}))
    assert ResNet20(tmp_path / "copy.npz").digest == network.digest
    assert ResNet20(tmp_path / "other.npz").digest != network.digest
    assert frechet_distance(features[:4000], features[4000:]) == pytest.approx(0.1, abs=0.05)
    noise = np.random.default_rng(0).integers(0, 256, (2000, 32, 32, 3), dtype=np.uint8)
    assert frechet_distance(features[:4000], features_of(network, noise, device)) > 50


@pytest.mark.slow
def test_inception_is_loaded_by_its_hash_alone(tmp_path, real_images, monkeypatch):
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
    monkeypatch.setattr(inception, "WEIGHTS_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    pooled = inception.inception_features(str(path), real_images[:3], torch.device("cpu"))
    assert pooled.shape == (3, 2048) and np.isfinite(pooled).all()
