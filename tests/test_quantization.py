"""Dequantisation and quantisation."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from ade_model.quantization import dequantize, quantize


@given(st.lists(st.integers(0, 255), min_size=1, max_size=20), st.floats(0, 0.999))
def test_quantize_undoes_dequantize(pixels, u):
    images = torch.tensor(pixels, dtype=torch.float64)
    x = dequantize(images, u)
    assert ((x >= 0) & (x < 1)).all()
    assert torch.equal(quantize(x), images)


def test_every_level_survives_in_float32():
    images = torch.arange(256, dtype=torch.float32)
    assert torch.equal(quantize(dequantize(images, 0.5)), images)


def test_quantize_clamps():
    assert quantize(torch.tensor([-0.05, 1.0, 1.05])).tolist() == [0, 255, 255]
