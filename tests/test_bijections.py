"""Every bijection: round trip, log-determinant against autograd, a gradient through the inverse."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ade_model.bijections import (
    AffineCoupling,
    Chain,
    CheckerboardCoupling,
    Logit,
    OnHalfOfTheChannels,
    Rotation,
    Squeeze,
)
from ade_model.config import ModelConfig
from ade_model.flow import build_flow
from tests.helpers import shake


def flow(scales, channels=1, size=4, mask="channel"):
    return build_flow(
        ModelConfig(
            image_size=size,
            channels=channels,
            widths=(4,),
            latent_channels=(1,),
            flow_mask=mask,
            decoder_blocks=(1,),
            flow_scales=scales,
            flow_couplings=2,
            flow_width=4,
        )
    )


CASES = {
    "identity": (Chain, (2, 4, 4)),
    "logit": (Logit, (2, 2, 2)),
    "squeeze": (Squeeze, (2, 4, 4)),
    "rotation": (lambda: Rotation(4), (4, 2, 2)),
    "coupling": (lambda: AffineCoupling(4, 6, 1, 0.7), (4, 2, 2)),
    "coupling of an odd number of channels": (lambda: AffineCoupling(3, 6, 0, 0.7), (3, 2, 2)),
    "checkerboard": (lambda: CheckerboardCoupling(2, 4, 0, 6, 1, 0.7), (2, 4, 4)),
    "checkerboard, other field": (lambda: CheckerboardCoupling(1, 4, 1, 6, 0, 0.7), (1, 4, 4)),
    "half": (lambda: OnHalfOfTheChannels(AffineCoupling(2, 4, 1, 0.7)), (4, 2, 2)),
    "chain": (lambda: Chain(Logit(), Rotation(4), AffineCoupling(4, 6, 1, 2.0)), (4, 2, 2)),
    "no flow": (lambda: flow(0), (1, 4, 4)),
    "flow, one scale": (lambda: flow(1), (1, 4, 4)),
    "flow, two scales": (lambda: flow(2), (1, 4, 4)),
    "checkerboards, one scale": (lambda: flow(1, mask="checkerboard"), (1, 4, 4)),
    "checkerboards, two scales": (lambda: flow(2, mask="checkerboard"), (1, 4, 4)),
    "flow, colour": (lambda: flow(2, channels=3), (3, 4, 4)),
}


def make(name):
    torch.manual_seed(1)
    build, shape = CASES[name]
    layer = shake(build().double(), scale=0.3)
    x = 0.02 + 0.96 * torch.rand(3, *shape, dtype=torch.float64)
    return layer, x


@pytest.mark.parametrize("name", CASES)
def test_round_trip(name):
    layer, x = make(name)
    y, _ = layer(x)
    assert (layer.inverse(y) - x).abs().max() < 1e-9


@pytest.mark.parametrize("name", CASES)
def test_log_determinant_is_that_of_the_jacobian(name):
    layer, x = make(name)
    _, log_det_jacobian = layer(x)
    assert log_det_jacobian.shape == (3,)
    for i in range(len(x)):
        jacobian = torch.autograd.functional.jacobian(lambda v: layer(v[None])[0][0], x[i])
        matrix = jacobian.reshape(x[i].numel(), x[i].numel())
        expected = torch.linalg.slogdet(matrix).logabsdet
        assert abs((expected - log_det_jacobian[i]).item()) < 1e-8


@pytest.mark.parametrize("name", CASES)
def test_jacobian_of_the_inverse_is_the_inverse_matrix(name):
    """Adversarial training differentiates ``inverse``: its whole Jacobian must be right."""
    layer, x = make(name)
    jacobian = torch.autograd.functional.jacobian
    size = x[0].numel()
    for row in x:
        y = layer(row[None])[0][0].detach()
        forward = jacobian(lambda v: layer(v[None])[0][0], row).reshape(size, size)
        inverse = jacobian(lambda v: layer.inverse(v[None])[0], y).reshape(size, size)
        assert torch.allclose(inverse @ forward, torch.eye(size, dtype=row.dtype), atol=1e-8)


@pytest.mark.parametrize("name", CASES)
def test_map_of_the_log_determinant_sums_to_it(name):
    """The map has one term per position."""
    layer, x = make(name)
    _, log_det_map = layer.with_map(x)
    assert log_det_map.shape == (3, *x.shape[2:])
    assert torch.allclose(log_det_map.sum((1, 2)), layer(x)[1])


@pytest.mark.parametrize("name", CASES)
def test_gradient_through_the_inverse(name):
    layer, x = make(name)
    y = layer(x)[0].detach().requires_grad_(True)
    layer.inverse(y).square().sum().backward()
    assert y.grad is not None and torch.isfinite(y.grad).all() and (y.grad != 0).any()


@pytest.mark.parametrize("name", ["rotation", "coupling", "flow, two scales"])
def test_gradient_reaches_the_weights(name):
    layer, x = make(name)
    y, log_det_jacobian = layer(x)
    (y.square().sum() + log_det_jacobian.sum()).backward()
    for parameter in layer.parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all()


def test_batch_rows_are_independent():
    layer, x = make("flow, two scales")
    whole, log_det_jacobian = layer(x)
    alone, log_det_alone = layer(x[1:2])
    assert torch.allclose(whole[1:2], alone, atol=1e-12) and torch.allclose(
        log_det_jacobian[1:2], log_det_alone
    )


def test_rotation_is_orthogonal_whatever_its_weights():
    rotation = Rotation(6).double()
    shake(rotation, scale=10)
    assert torch.allclose(
        rotation.matrix() @ rotation.matrix().t(), torch.eye(6, dtype=torch.float64), atol=1e-12
    )


def test_max_log_scale_bounds_the_output_of_the_coupling_net():
    x = 100 * torch.randn(4, 4, 2, 2, dtype=torch.float64)
    for bound in (0.5, 1.0):
        coupling = shake(AffineCoupling(4, 6, 1, bound).double(), scale=5)
        log_scale, _ = coupling.log_scale_and_shift(x[:, :2])
        assert (log_scale - coupling.log_gain).abs().max() <= bound


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.sampled_from([8, 16, 24]), st.integers(0, 10_000))
def test_any_flow_round_trips(scales, channels, size, seed):
    torch.manual_seed(seed)
    layer = shake(flow(scales, channels, size).double(), seed)
    x = torch.rand(2, channels, size, size, dtype=torch.float64)
    y, _ = layer(x)
    assert y.shape == x.shape
    assert (layer.inverse(y) - x).abs().max() < 1e-9
