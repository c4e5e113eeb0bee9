"""What several tests share: small models, real images and a bundle of a small model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ade_model import ADEModel, ModelConfig
from ade_model.checkpoint import save_model

ROOT = Path(__file__).parents[1]
DATA = Path(__file__).parent / "data"
PRETRAINED = ROOT / "pretrained" / "cifar10"
TINY = ModelConfig(image_size=8, channels=3, widths=(8, 8), latent_channels=(3, 2), decoder_blocks=(1, 1),
                   flow_couplings=2, flow_width=8)


def shake(model: torch.nn.Module, seed: int = 0, scale: float = 0.15) -> torch.nn.Module:
    """Move every weight off its start, so that no layer is the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model


def make_model(config: ModelConfig = TINY, seed: int = 0, scale: float = 0.15) -> ADEModel:
    torch.manual_seed(seed)
    return shake(ADEModel(config), seed, scale).eval()


@pytest.fixture(scope="session")
def real_images() -> np.ndarray:
    """300 test images of CIFAR-10, uint8 ``(300, 32, 32, 3)``."""
    return np.asarray(Image.open(DATA / "cifar10_test_300.webp").convert("RGB")).reshape(-1, 32, 32, 3)


@pytest.fixture(scope="session")
def small_images(real_images: np.ndarray) -> np.ndarray:
    """Corners of real images, uint8 ``(300, 8, 8, 3)``."""
    return np.ascontiguousarray(real_images[:, 12:20, 12:20])


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model of a few thousand random weights."""
    folder = tmp_path_factory.mktemp("checkpoint")
    save_model(make_model(scale=0.06), folder, {"recipe": "av-ade", "data": "corners", "splits": {}, "seed": 0,
                                      "images_seen": 0})
    return folder


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, small_images: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of that model, exported and calibrated by the real code."""
    from export.calibrate import calibrate_bundle
    from export.write import export_bundle

    out = tmp_path_factory.mktemp("bundles") / "tiny"
    export_bundle(tiny_checkpoint, out, "tiny", small_images[:40], None)
    calibrate_bundle(out, small_images[:150], small_images[150:], "corners")
    return out
