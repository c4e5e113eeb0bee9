"""Statistics of images against known answers, and their independence of the batch."""

import math

import numpy as np
import pytest

from ade_base.pictures.show import lossless_bits
from serving.verdict.encoder import SEEN
from serving.verdict.lesson import LESSON
from serving.verdict.semantic import DISTANCE, ENERGY
from serving.verdict.statistics import MEANINGS, compute_statistics, meaning, statistic_names


def outputs(count, channels=3, size=32, levels=2, **given):
    """Outputs of the graph of a perfect model: the residual is white noise."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.normal(size=(count, *shape)).astype(np.float32)

    made = {
        "parts": normal(2 + levels),
        "cost": normal(3, size, size),
        "y": normal(channels, size, size),
        "residual": normal(channels, size, size),
    }
    return {**made, **{f"surprise_{i}": normal(4, 8, 8) for i in range(levels)}, **given}


def images(count, channels=3, size=32):
    return np.random.default_rng(1).integers(0, 256, (count, size, size, channels), np.uint8)


def test_white_noise_is_white():
    found = compute_statistics(images(40), outputs(40))
    sd = 1 / math.sqrt(3072)
    for name in (
        "residual_mean",
        "residual_rows",
        "residual_columns",
        "residual_channels",
        "residual_lag_2",
        "feature_rows",
        "feature_columns",
    ):
        assert abs(found[name].mean()) < 5 * sd / math.sqrt(40), name
        assert 0.4 * sd < found[name].std() < 2 * sd, name
    assert found["residual_energy"].mean() == pytest.approx(0, abs=0.01)
    assert found["residual_kurtosis"].mean() == pytest.approx(math.log(3), abs=0.02)
    assert found["latent_0_energy"].mean() == pytest.approx(0, abs=0.05)


def test_structure_in_the_residual_is_seen():
    rng = np.random.default_rng(2)
    white = rng.normal(size=(1, 3, 32, 32)).astype(np.float32)

    def of(residual):
        return {
            k: float(v[0])
            for k, v in compute_statistics(images(1), outputs(1, residual=residual)).items()
        }

    assert of(np.repeat(white[:, :, :, ::2], 2, axis=3))["residual_columns"] == pytest.approx(
        0.5, abs=0.08
    )
    assert of(np.repeat(white[:, :, ::2], 2, axis=2))["residual_rows"] == pytest.approx(
        0.5, abs=0.08
    )
    assert of(np.repeat(white[:, :1], 3, axis=1))["residual_channels"] == pytest.approx(1, abs=1e-5)
    assert of(2 * white)["residual_energy"] == pytest.approx(math.log(4), abs=0.1)
    assert of(white + 1)["residual_mean"] == pytest.approx(1, abs=0.1)
    uneven = white.copy()
    uneven[:, :, :8, :8] *= 4
    assert of(uneven)["residual_unevenness"] > of(white)["residual_unevenness"] + 1
    blocks = np.repeat(np.repeat(white[:, :, ::2, ::2], 2, 2), 2, 3)
    assert of(blocks)["residual_patches"] > of(white)["residual_patches"] + 2


def test_pixels_by_hand():
    picture = np.zeros((1, 32, 32, 3), np.uint8)
    picture[:, :, 16:] = 255
    found = {k: float(v[0]) for k, v in compute_statistics(picture, outputs(1)).items()}
    assert found["pixel_mean_0"] == pytest.approx(0.5) and found[
        "pixel_contrast_1"
    ] == pytest.approx(math.log(0.501))
    assert found["pixel_edges_down"] == pytest.approx(math.log(1e-4))
    assert found["pixel_edges_across"] == pytest.approx(math.log(1 / 31 + 1e-4), rel=1e-4)
    assert found["pixel_black"] == found["pixel_white"] == pytest.approx(math.log(51))
    assert found["pixel_channels_0"] == pytest.approx(1, abs=1e-5) and found[
        "pixel_chroma"
    ] < math.log(2e-3)
    assert found["map_follows_edges"] == pytest.approx(0, abs=0.1)


def test_bits_and_complexity():
    parts = np.array([[1.5, -5.0, 0.2, 0.1]], np.float32)
    picture = images(1)
    found = compute_statistics(picture, outputs(1, parts=parts))
    assert found["bpd"][0] == pytest.approx(4.8) and found["kl_1"][0] == pytest.approx(0.1)
    assert found["excess"][0] == pytest.approx(4.8 - lossless_bits(picture[0]), rel=1e-6)


def test_lossless_bits():
    noise, flat = images(1)[0], np.full((32, 32, 3), 7, np.uint8)
    assert 8.0 < lossless_bits(noise) < 8.3 and lossless_bits(flat) < 0.15
    assert 8.0 < lossless_bits(images(1, channels=1)[0]) < 9.5
    assert lossless_bits(images(1, channels=5)[0]) > 8.0


@pytest.mark.parametrize("channels, size", [(1, 8), (3, 8), (3, 9), (4, 16), (3, 64)])
def test_any_shape(channels, size):
    found = compute_statistics(images(3, channels, size), outputs(3, channels, size))
    assert all(
        v.shape == (3,) and v.dtype == np.float32 and np.isfinite(v).all() for v in found.values()
    )


@pytest.mark.parametrize("value", [0, 128, 255])
def test_a_flat_image_has_finite_statistics(value):
    flat = np.full((1, 32, 32, 3), value, np.uint8)
    nothing = {k: np.zeros_like(v) for k, v in outputs(1).items()}
    assert all(np.isfinite(v).all() for v in compute_statistics(flat, nothing).values())


@pytest.mark.parametrize("batch", [1, 2, 7, 31, 32, 33])
def test_statistics_do_not_depend_on_the_batch(batch, pretrained_engine, real_images):
    few = pretrained_engine.statistics(real_images[:1])
    many = pretrained_engine.statistics(real_images[:batch])
    assert few.keys() == many.keys() and all(
        np.array_equal(few[name][0], many[name][0]) for name in few
    )


def test_statistics_do_not_depend_on_the_order_of_memory():
    images = np.random.default_rng(1).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    planes = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)
    expected = compute_statistics(images, outputs(3))
    for same in (planes, np.asfortranarray(images)):
        found = compute_statistics(same, outputs(3))
        assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_every_statistic_has_a_meaning(pretrained_engine):
    engine = pretrained_engine
    assert engine.calibration is not None
    names = [*statistic_names(engine.image_shape, engine.latent_shapes), DISTANCE, ENERGY]
    names += [*SEEN, LESSON]
    assert all(meaning(name) for name in (*names, *engine.calibration.names))
    assert all(any(name.startswith(start) for name in names) for start in MEANINGS)
