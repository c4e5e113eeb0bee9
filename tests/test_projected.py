"""The projected discriminator: frozen features, small heads, and metrics it must not bias."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from ade_base.errors import ConfigError
from tests.helpers import narrow
from tests.training_runs import batches, trainer
from training.augment import NUMBERS, augment
from training.config import DiscriminatorConfig
from training.discriminator import make_discriminator
from training.losses import discriminator_loss, hinge_discriminator_loss
from training.projected import ProjectedDiscriminator
from training.recipes import recipe, saw_efficientnet
from training.runs import Progress, RunError, load_checkpoint, save_checkpoint
from training.weights import count_weights

CONFIG = dataclasses.replace(narrow("av-ade-pd", image_size=32), batch_size=8)


@pytest.mark.parametrize("size", [8, 32, 48, 64, 96])
def test_every_level_has_the_same_weight_whatever_the_size(size):
    torch.manual_seed(0)
    discriminator = ProjectedDiscriminator((8, 8, 8, 8), size, 3)
    x = torch.rand(2, 3, size, size, requires_grad=True)
    logits = discriminator(x)
    assert logits.shape == (2, 80) and logits.dtype == torch.float32
    (slope,) = torch.autograd.grad(logits.sum(), x)
    assert torch.isfinite(slope).all() and slope.abs().amax((1, 2, 3)).min() > 0
    for level in range(4):  # each level's logits depend on the images, and the heads on all of them
        assert logits[:, 16 * level : 16 * (level + 1)].std() > 0


def test_a_batch_that_repeats_itself_is_noticed():
    """The comparison alone tells a batch of copies from different images, and learns to."""
    torch.manual_seed(0)
    compare = ProjectedDiscriminator((8, 8, 8, 8), 32, 3).compare
    optimizer = torch.optim.Adam(compare.parameters(), 1e-2)
    gaps = []
    for _ in range(60):
        different = torch.randn(12, 8, 2, 2)
        repeated = different[:3].repeat(4, 1, 1, 1)  # each image by itself looks real
        real, fake = compare(different), compare(repeated)
        gaps.append((real - fake).mean().item())
        optimizer.zero_grad()
        hinge_discriminator_loss(real, fake).backward()
        optimizer.step()
    assert gaps[-1] > max(0.5, gaps[0])
    assert compare(different[:1]).shape == (1, 1)


def test_the_heads_largest_singular_values_are_1():
    torch.manual_seed(0)
    discriminator = ProjectedDiscriminator((8, 8, 8, 8), 32, 3)
    with torch.no_grad():
        for parameter in [*discriminator.heads.parameters(), *discriminator.compare.parameters()]:
            parameter.mul_(5)
        for _ in range(5):
            discriminator(torch.rand(2, 3, 32, 32))
    layers = [m for m in discriminator.heads.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(layers) == 9  # 3 of the finest level, 2 of each other
    for layer in [*layers, discriminator.compare.head]:
        norm = torch.linalg.matrix_norm(layer.weight.flatten(1), ord=2)
        assert norm.item() == pytest.approx(1, rel=0.05)


def test_the_trainer_uses_the_hinge_loss(real_images):
    trained = trainer(CONFIG)
    logits: list[torch.Tensor] = []
    network = trained.adversaries[0].network
    judge = network.judge
    network.judge = lambda levels: logits.append(judge(levels)) or logits[-1]  # type: ignore[method-assign,func-returns-value]
    losses = trained.run(batches(real_images, 1, CONFIG)[0])
    real, fake, _ = logits  # the last are the generator's
    assert losses["d_loss"] == pytest.approx(hinge_discriminator_loss(real, fake).item())
    assert losses["d_loss"] != pytest.approx(discriminator_loss(real, fake).item(), rel=0.01)


def test_only_the_heads_are_trained_counted_and_kept(real_images):
    trained = trainer(CONFIG)
    heads_alone = ("heads.", "compare.")
    buffers = trained.adversaries[0].network.named_buffers()
    frozen = {n: value.clone() for n, value in buffers if not n.startswith(heads_alone)}
    assert {name.split(".")[0] for name in frozen} == {"features", "mix_channels", "mix_scales"}
    assert all(name.startswith(heads_alone) for name in trained.adversaries[0].network.state_dict())
    heads = {name: p.clone() for name, p in trained.adversaries[0].network.named_parameters()}
    for batch in batches(real_images, 2, CONFIG):
        losses = trained.run(batch)
    assert {"d_loss", "quality_loss", "bpd"} <= losses.keys() and "gradient_penalty" not in losses
    parameters = trained.adversaries[0].network.named_parameters()
    assert not any(torch.equal(p, heads[name]) for name, p in parameters if p.ndim > 1)
    # Frozen parts are the same for every seed: they are rebuilt, not stored.
    again = trainer(CONFIG, seed=5).adversaries[0].network
    for discriminator in (trained.adversaries[0].network, again):
        now = dict(discriminator.named_buffers())
        assert all(torch.equal(value, now[name]) for name, value in frozen.items())
    counted = count_weights(recipe("av-ade-pd", 32, 3, "tiny")).discriminator
    full = make_discriminator(recipe("av-ade-pd", 32, 3).discriminator, 32, 3)
    assert counted == sum(p.numel() for p in full.parameters()) == 906_949


def test_the_discriminator_learns_and_the_generator_gets_its_gradient(real_images):
    """Its loss falls, and only the generator's path gets a gradient, not the flow."""
    alone = {"coverage": False, "free_bits": 0.0, "reconstruction_weight": 0.0, "noisy_share": 0.0}
    trained = trainer(dataclasses.replace(CONFIG, d_learning_rate=2e-3, warmup_steps=1, **alone))
    seen: set[str] = set()
    step = trained.optimizer.step

    def look():
        parameters = trained.model.named_parameters()
        seen.update(n for n, p in parameters if p.grad is not None and p.grad.any())
        step()

    trained.optimizer.step = look  # type: ignore[method-assign,assignment]
    losses = [trained.run(batch)["d_loss"] for batch in batches(real_images, 20, CONFIG)]
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.3
    assert any("to_mean" in n for n in seen) and not any(n.startswith("flow.") for n in seen)


def test_a_run_that_compares_images_resumes_with_as_many_processes(tmp_path):
    """Another number of them would give each comparison another number of images."""
    folder = save_checkpoint(tmp_path, trainer(CONFIG), Progress(), {"recipe": "av-ade-pd"})
    load_checkpoint(folder, trainer(CONFIG))
    after = trainer(CONFIG)
    after.processes = 2
    with pytest.raises(RunError, match="cannot be resumed by 2 processes: .* needs 1 as before"):
        load_checkpoint(folder, after)


def test_hinge_loss():
    real, fake = torch.tensor([[2.0, 0.5]]), torch.tensor([[-3.0, 0.0]])
    assert hinge_discriminator_loss(real, fake).item() == pytest.approx((0 + 0.5) / 2 + (0 + 1) / 2)


def test_augmentation_changes_colours_and_place(real_images):
    x = torch.from_numpy(real_images[:4].copy()).permute(0, 3, 1, 2).float() / 255
    centre = torch.full((4, NUMBERS), 0.5)  # no change at 0.5
    assert torch.allclose(augment(x, centre), x, atol=1e-6)

    def at(place, value):
        numbers = centre.clone()
        numbers[:, place] = value
        return augment(x, numbers)

    assert torch.allclose(at(0, 0.9), x + 0.2, atol=1e-6)
    assert torch.allclose(at(1, 0.0), x.mean(1, keepdim=True).expand_as(x), atol=1e-6)  # grey
    assert torch.allclose(at(2, 0.0).std((1, 2, 3)), x.std((1, 2, 3)) / 2, atol=1e-5)
    for place, moved in ((3, at(3, 0.0)), (4, at(4, 0.0))):  # by four pixels, an eighth
        kept, came = (
            (moved[..., 4:], x[..., :-4]) if place == 3 else (moved[:, :, 4:], x[:, :, :-4])
        )
        assert torch.allclose(kept, came, atol=1e-6)
        assert torch.allclose(
            (moved[..., :4] if place == 3 else moved[:, :, :4]), torch.tensor(0.5), atol=1e-6
        )
    x.requires_grad_(True)
    (slope,) = torch.autograd.grad(augment(x, torch.rand(4, NUMBERS)).sum(), x)
    assert torch.isfinite(slope).all() and slope.abs().sum() > 0


@pytest.mark.parametrize(
    "change, message",
    [({"widths": (8, 8)}, "needs 4 d_widths"), ({"plain_stages": 1}, "0 d_plain_stages")],
)
def test_a_projected_discriminator_has_four_levels(change, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(recipe("av-ade-pd", 32, 3).discriminator, **change)
    with pytest.raises(ConfigError, match="images of 3 channels, got 1"):
        make_discriminator(DiscriminatorConfig((8, 8, 8, 8), "projected"), 32, 1)


def test_a_model_that_learnt_from_efficientnet_is_known_by_its_ancestors():
    about = {"recipe": "av-ade-pd"}
    assert saw_efficientnet(about) and saw_efficientnet({"recipe": "av-ade", "started_from": about})
    assert saw_efficientnet({"recipe": "v-ade", "started_from": None, "flow_from": about})
    assert saw_efficientnet({"recipe": "v-ade", "started_from": {"flow_from": about}})
    assert not saw_efficientnet(
        {"recipe": "av-ade", "started_from": {"recipe": "v-ade", "started_from": None}}
    )
