"""Random numbers: reproducible across versions, independent, and correctly distributed."""

import hashlib

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ade_client.contract import MAX_SEED
from serving.engine.noise import NoiseStream, image_digest, image_key, sample_key


def test_the_streams_are_those_of_version_1():
    """Changing any of this changes every sample and every score that users have seen."""
    stream = NoiseStream(sample_key(7, 3))
    assert hashlib.sha256(stream.uniform((64,)).tobytes()).hexdigest()[:16] == "04e02e5801a33928"
    normals = stream.normal((4, 4))
    assert np.allclose(normals[0], [-0.0876371, 0.6378855, 0.6005905, -0.5982022], atol=1e-6)
    assert (
        image_key(0, image_digest(np.zeros((2, 2, 3), np.uint8)), 1).hex()
        == "1115f496c39eef3cb057c19d8bc91b3e"
    )


@settings(max_examples=50)
@given(st.integers(0, MAX_SEED), st.integers(0, MAX_SEED), st.integers(0, 63))
def test_every_part_of_the_key_counts(seed, index, draw):
    of_samples = {sample_key(seed, index), sample_key(seed ^ 1, index), sample_key(seed, index ^ 1)}
    one, other = (image_digest(np.full((2, 2, 3), value, np.uint8)) for value in (0, 1))
    of_images = {
        image_key(seed, one, draw),
        image_key(seed ^ 1, one, draw),
        image_key(seed, other, draw),
        image_key(seed, one, draw + 1),
    }
    assert len(of_samples | of_images) == 3 + 4


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4))
def test_a_stream_repeats_itself(counts):
    one, two = NoiseStream(b"k" * 16), NoiseStream(b"k" * 16)
    assert all(np.array_equal(one.normal((n,)), two.normal((n,))) for n in counts)


def test_distributions():
    stream = NoiseStream(sample_key(0, 0))
    uniform = stream.uniform((200_000,))
    assert uniform.dtype == np.float32 and uniform.min() >= 0 and uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 0.003 and abs(uniform.std() - 12**-0.5) < 0.002
    normal = stream.normal((200_001,))
    assert normal.dtype == np.float32 and np.isfinite(normal).all()
    assert abs(normal.mean()) < 0.01 and abs(normal.std() - 1) < 0.01
    assert abs((np.abs(normal) > 1.96).mean() - 0.05) < 0.003
    assert abs(np.corrcoef(normal[:-1], normal[1:])[0, 1]) < 0.01


def test_digest_is_of_the_pixels():
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    assert image_digest(pixels) == image_digest(pixels[::-1][::-1])
    assert image_digest(pixels) != image_digest(pixels[::-1])
