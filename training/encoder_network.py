"""The small encoder's network, which every score or training step pays for.

It takes about 45 million multiply-adds for 32x32 pixels.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from training.data import DataError

WIDTHS = (32, 128, 256)
STEM = 32
MAX_SIZE = 32  # images of 64 pixels or more are averaged down; the network sees fewer than 64
MIN_SIZE = 8


def check_size(image_size: int) -> None:
    """Check that images are large enough for an encoder.

    Raises:
        DataError: they are smaller.
    """
    if image_size < MIN_SIZE:
        raise DataError(f"an encoder needs images of {MIN_SIZE} pixels or more, got {image_size}")


class _Block(nn.Module):
    """Halves the size: a convolution with pooling, then a residual one."""

    def __init__(self, ins: int, outs: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(ins, outs, 3, padding=1, bias=False)
        self.second = nn.Conv2d(outs, outs, 3, padding=1, bias=False)
        self.first_norm, self.second_norm = nn.BatchNorm2d(outs), nn.BatchNorm2d(outs)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first_norm(F.max_pool2d(self.first(x), 2)))
        return x + F.relu(self.second_norm(self.second(x)))


class SmallEncoder(nn.Module):
    """Pixels to features, and to logits of classes if it was trained with them.

    Args:
        image_size: pixels per side.
        channels: of the images.
        classes: 0 without labels.
    """

    def __init__(self, image_size: int, channels: int, classes: int = 0) -> None:
        super().__init__()
        check_size(image_size)
        self.shrink = max(1, image_size // MAX_SIZE)
        self.stem = nn.Conv2d(channels, STEM, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(STEM)
        widths = (STEM, *WIDTHS)
        self.blocks = nn.Sequential(
            *(_Block(ins, outs) for ins, outs in zip(widths[:-1], widths[1:], strict=True))
        )
        self.classifier = nn.Linear(WIDTHS[-1], classes) if classes else None

    def features(self, images: Tensor) -> Tensor:
        """``(N, F)`` of uint8 or float ``(N, H, W, C)``, values of 0..255."""
        return self.levels(images)[-1]

    def levels(self, images: Tensor) -> list[Tensor]:
        """The mean over positions of each block's result, ``(N, F)``; the last are the features."""
        x = images.permute(0, 3, 1, 2).float() / 64 - 2
        x = F.avg_pool2d(x, self.shrink) if self.shrink > 1 else x
        x = F.relu(self.norm(self.stem(x)))
        found = []
        for block in self.blocks:
            x = block(x)
            found.append(x.mean((2, 3)))
        return found

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """What the exported graph gives: features, and logits if there are classes."""
        features = self.features(images)
        return (features,) if self.classifier is None else (features, self.classifier(features))
