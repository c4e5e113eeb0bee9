"""What several tests share: small models, real images and a bundle of a small model."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image

from ade_model import ADEModel, ModelConfig
from ade_model.checkpoint import save_model
from serving.engine.bundle import CALIBRATION_NAME, open_bundle, write_manifest
from serving.verdict.calibration import Calibrations

if TYPE_CHECKING:
    from tests.service import RunningService
    from training.recipes import TrainConfig

ROOT = Path(__file__).parents[1]
DATA = Path(__file__).parent / "data"
PRETRAINED = ROOT / "pretrained" / "cifar10"
TINY = ModelConfig(
    image_size=8,
    channels=3,
    widths=(8, 8),
    latent_channels=(3, 2),
    decoder_blocks=(1, 1),
    flow_couplings=2,
    flow_width=8,
)


def shake(model: torch.nn.Module, seed: int = 0, scale: float = 0.15) -> torch.nn.Module:
    """Move every weight off its start, so that no layer is the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator).to(
                parameter.dtype
            )
    return model


def make_model(config: ModelConfig = TINY, seed: int = 0, scale: float = 0.15) -> ADEModel:
    torch.manual_seed(seed)
    return shake(ADEModel(config), seed, scale).eval()


def narrow(name: str, size: str = "tiny", image_size: int = 8, **changes: Any) -> TrainConfig:
    """A recipe with everything that sets it apart, but with networks of a few channels."""
    from training.recipes import recipe

    config = recipe(name, 32, 3, size, batch_size=16, **changes)
    model, levels = config.model, min(2, len(config.model.widths))
    small: dict[str, Any] = {
        "image_size": image_size,
        "widths": (8,) * levels,
        "flow_width": 8,
        "flow_couplings": 2,
        "latent_channels": tuple(min(3, c) for c in model.latent_channels[:levels]),
        "decoder_blocks": model.decoder_blocks[:levels],
    }
    discriminator = config.discriminator
    if discriminator is not None:
        stages = 4 if discriminator.kind == "projected" else 2 + discriminator.plain_stages
        discriminator = dataclasses.replace(discriminator, widths=(8,) * stages)
    return dataclasses.replace(
        config, model=dataclasses.replace(model, **small), discriminator=discriminator
    )


@pytest.fixture(scope="session")
def real_images() -> np.ndarray:
    """300 test images of CIFAR-10, uint8 ``(300, 32, 32, 3)``."""
    return np.asarray(Image.open(DATA / "cifar10_test_300.webp").convert("RGB")).reshape(
        -1, 32, 32, 3
    )


@pytest.fixture(scope="session")
def small_images(real_images: np.ndarray) -> np.ndarray:
    """Corners of real images, uint8 ``(300, 8, 8, 3)``."""
    return np.ascontiguousarray(real_images[:, 12:20, 12:20])


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model of a few thousand random weights."""
    folder = tmp_path_factory.mktemp("checkpoint")
    save_model(
        make_model(scale=0.06),
        folder,
        {"recipe": "av-ade", "data": "corners", "splits": {}, "seed": 0, "images_seen": 0},
    )
    return folder


@pytest.fixture(scope="session")
def tiny_bundle(
    tiny_checkpoint: Path, small_images: np.ndarray, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The bundle of that model, exported and calibrated by the real code."""
    from export.verdict.calibrate import calibrate_bundle
    from export.write import export_bundle

    folder = tmp_path_factory.mktemp("bundles")
    export_bundle(tiny_checkpoint, folder / "exported", "tiny", small_images[:40], None)
    calibrate_bundle(
        folder / "exported", folder / "tiny", small_images[:150], small_images[150:], "corners"
    )
    return folder / "tiny"


def with_calibrations(
    bundle: Path,
    out: Path,
    change: Callable[[Calibrations], Calibrations | None],
    name: str | None = None,
) -> Path:
    """A copy of a bundle with other calibrations, or without any; under another name too."""
    shutil.copytree(bundle, out)
    changed = change(Calibrations.load(out / CALIBRATION_NAME))
    (out / CALIBRATION_NAME).unlink()
    manifest = open_bundle(bundle).manifest
    if changed is not None:
        (out / CALIBRATION_NAME).write_bytes(changed.to_bytes())
    about = manifest["calibration"] if changed else None
    write_manifest(out, {**manifest, "name": name or manifest["name"], "calibration": about})
    return out


@pytest.fixture(scope="session")
def service() -> Iterator[RunningService]:
    """``ade serve`` with the bundle that ships, for every test that leaves it as it was."""
    from tests.service import RunningService

    running = RunningService(PRETRAINED)
    yield running
    running.stop()


def make_folder(folder: Path, images: np.ndarray) -> Path:
    """A folder of class folders, with what people's folders hold."""
    for i, image in enumerate(images):
        target = folder / f"class{i % 3}"
        target.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(target / f"{i:04d}.png")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "notes.txt").write_text("not an image")
    Image.new("L", (40, 20), 90).save(folder / "wide.png")
    return folder


def make_traps(folder: Path) -> dict[str, str]:
    """What must not be opened, read to its end or waited for, with the reason that is given for
    each.
    """
    os.mkfifo(folder / "pipe.png")
    (folder / "endless.png").symlink_to("/dev/zero")
    (folder / "gone.png").symlink_to(folder / "nowhere")
    with open(folder / "huge.png", "wb") as file:
        file.truncate(2**40)
    return {
        "pipe.png": "not a regular file",
        "endless.png": "not a regular file",
        "gone.png": "No such file or directory",
        "huge.png": "an image file may have 16777216 bytes, this one has 1099511627776",
    }
