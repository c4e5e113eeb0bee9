"""Guides: frozen networks whose features generated images should match.

The discriminator of ``av-ade-pd`` sees images through a network that was trained on other images.
An encoder that was trained on the same ones knows what tells them apart, and costs little. But it
sees nothing else: the other network beside it keeps images from becoming right for the encoder
alone.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ade_base.system import cpu_session
from ade_model.quantization import NUM_LEVELS
from training.encoder_network import MIN_SIZE, WIDTHS, SmallEncoder
from training.metrics.efficientnet import LEVEL_CHANNELS, load_efficientnet
from training.metrics.features import FeatureError

NAME = "guide.onnx"  # in a run's folder
_NORM_EPS = 1e-5  # PyTorch's, of batch normalisation
_TOLERANCE = 1e-3
CLASSIFIER_SIDE = 128  # pixels to which images are resized for the classifier


class Guide(nn.Module):
    """From ``x``, ``(N, C, H, W)`` in [0, 1], to the features of all levels, ``(N, dims)``.

    Args:
        encoder: in evaluation mode; its weights become constants.
    """

    def __init__(self, encoder: SmallEncoder) -> None:
        super().__init__()
        self._encoder = encoder.requires_grad_(False)
        self.dims = sum(WIDTHS)

    def forward(self, x: Tensor) -> Tensor:
        pixels = _clamped(x.float()) * NUM_LEVELS - 0.5
        levels = self._encoder.levels(pixels.permute(0, 2, 3, 1))
        return torch.cat([level.float() for level in levels], 1)


class ClassifierGuide(nn.Module):
    """From ``x``, ``(N, 3, H, W)`` in [0, 1], to features of EfficientNet-Lite0, ``(N, dims)``.

    They are the means over all positions of the channels of its four levels.

    Raises:
        FeatureError: the package with the weights is not installed.
    """

    def __init__(self) -> None:
        super().__init__()
        self._classifier = load_efficientnet(torch.get_default_device())
        self.dims = sum(LEVEL_CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        size = (CLASSIFIER_SIDE, CLASSIFIER_SIDE)
        x = F.interpolate(
            _clamped(x.float()), size, mode="bilinear", align_corners=False, antialias=True
        )
        levels = self._classifier.levels(x.contiguous(memory_format=torch.channels_last))
        return torch.cat([level.float().mean((2, 3)) for level in levels], 1)


def _clamped(x: Tensor) -> Tensor:
    """``x`` within [0, 1], with the gradient of ``x``.

    Beyond, nothing is an image, and features say nothing there; but without a gradient such values
    would learn nothing from a guide.
    """
    return x.clamp(0, 1).detach() + (x - x.detach())


def load_guide(path: Path, image_size: int, channels: int) -> Guide:
    """Read a small encoder (:mod:`training.small_encoder`), or a ``features.onnx`` that is one.

    Args:
        path: of the ONNX file.
        image_size: height and width of the images to generate, pixels.
        channels: of these.

    Raises:
        FeatureError: the file cannot be read, is another network, or is for other images.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ModuleNotFoundError as error:
        raise FeatureError("a guide needs onnx: pip install onnx") from error
    try:
        graph = onnx.load(path).graph
    except Exception as error:  # onnx and protobuf have no error of their own in common
        raise FeatureError(f"{path} is not a readable ONNX file: {error}") from error
    sizes = [[dim.dim_value for dim in one.type.tensor_type.shape.dim] for one in graph.input]
    found = {i.name: torch.from_numpy(numpy_helper.to_array(i).copy()) for i in graph.initializer}
    try:
        classes = len(found["classifier.bias"]) if "classifier.bias" in found else 0
        encoder = SmallEncoder(max(image_size, MIN_SIZE), channels, classes).eval()
        encoder.load_state_dict(_unfolded(found, encoder))
    except (KeyError, RuntimeError) as error:
        raise FeatureError(
            f"a guide must be a small encoder of images with {channels} channels; {path} is not"
        ) from error
    if [size[1:3] for size in sizes] != [[image_size, image_size]]:
        raise FeatureError(
            f"the encoder {path} must be for images of {image_size}x{image_size} pixels, "
            f"got {sizes}"
        )
    _check(path, encoder, image_size, channels)
    return Guide(encoder)


def _unfolded(found: dict[str, Tensor], encoder: SmallEncoder) -> dict[str, Tensor]:
    """The state dict of an encoder, from what the exporter made of it.

    It folds a batch normalisation into the convolution before it, which thereby gets a bias. Here
    the normalisation adds the bias, and does nothing else.
    """
    state = {}
    for name, value in encoder.state_dict().items():
        module, _, kind = name.rpartition(".")
        folded_into = "stem" if module == "norm" else module.removesuffix("_norm")
        bias = found.get(f"{folded_into}.weight_bias") if module.endswith("norm") else None
        if name in found:
            state[name] = found[name]
        elif kind == "num_batches_tracked":
            state[name] = value
        elif bias is not None:
            identity = {"running_mean": 0.0, "running_var": 1 - _NORM_EPS, "weight": 1.0}
            state[name] = bias if kind == "bias" else torch.full_like(value, identity[kind])
        else:
            raise KeyError(name)
    return state


def _check(path: Path, encoder: SmallEncoder, image_size: int, channels: int) -> None:
    """Compare the network with the file's own results, on noise."""
    images = np.random.default_rng(0).integers(0, 256, (2, image_size, image_size, channels))
    (wanted,) = cpu_session(path).run(["features"], {"images": images.astype(np.uint8)})
    with torch.no_grad():
        found = encoder.features(torch.from_numpy(images)).numpy()
    if wanted.shape != found.shape or np.abs(found - wanted).max() > _TOLERANCE * wanted.std():
        raise FeatureError(f"{path} is not a small encoder: it gives other features")
