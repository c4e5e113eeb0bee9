"""Muon: which weights it steps, and how far."""

import copy

import pytest
import torch
from torch import nn

from training.muon import Muon, orthogonalized
from training.runs import _load_optimizer, _save_optimizer


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3),
        nn.Conv2d(32, 16, 3),
        nn.Conv2d(16, 16, 1),
        nn.Flatten(),
        nn.Linear(16 * 16, 1),
    )


def step(made, optimizer, seed=0):
    torch.manual_seed(seed)
    optimizer.zero_grad()
    made(torch.randn(4, 3, 8, 8)).square().mean().backward()
    optimizer.step()


def test_a_stack_of_kernels_is_orthogonalised_as_each_of_them():
    kernels = torch.randn(3, 16, 144)
    alone = torch.stack([orthogonalized(kernel) for kernel in kernels])
    assert torch.allclose(orthogonalized(kernels), alone, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(orthogonalized(kernels), alone, atol=0.05)


@pytest.mark.parametrize("shape", [(16, 144), (144, 16)])
def test_singular_values_become_about_one(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape) @ torch.diag(torch.logspace(-1, 1, shape[1]))
    made = orthogonalized(matrix)
    values = torch.linalg.svdvals(made)
    assert values.min() > 0.5 and values.max() < 1.3
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    assert torch.nn.functional.cosine_similarity(made.flatten(), (u @ v).flatten(), dim=0) > 0.95


def test_wide_kernels_alone_are_orthogonalised_and_steps_are_as_large_as_adams():
    before, with_adam, with_muon = (network() for _ in range(3))
    step(with_adam, torch.optim.Adam(with_adam.parameters(), 1e-3))
    step(with_muon, Muon(with_muon.parameters(), 1e-3))
    weights = (dict(one.named_parameters()) for one in (before, with_adam, with_muon))
    old, adam, muon = weights
    for name in old:
        assert torch.equal(adam[name], muon[name]) == (name != "1.weight"), name
    moved = (muon["1.weight"] - old["1.weight"]).flatten(1)
    assert moved.square().mean().sqrt().item() == pytest.approx(0.2e-3, rel=0.2)
    values = torch.linalg.svdvals(moved)
    assert values.max() < 2.5 * values.min()
    assert with_muon[1].weight.grad is not None  # for whoever measures it


def test_its_state_is_saved_and_loaded(tmp_path):
    whole = network()
    optimizer = Muon(whole.parameters(), 1e-3)
    step(whole, optimizer)
    _save_optimizer(optimizer, tmp_path / "optimizer.safetensors")
    resumed = copy.deepcopy(whole)
    other = Muon(resumed.parameters(), 1e-3)
    _load_optimizer(other, tmp_path / "optimizer.safetensors")
    for made, its in ((whole, optimizer), (resumed, other)):
        step(made, its, seed=1)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
