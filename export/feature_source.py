"""A network for features, as its user describes it. This module needs no ONNX package."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ade_base.errors import UserError

FORMAT = "scale=SCALE,size=PIXELS,layout=nchw|nhwc,order=rgb|bgr, or some of these"
# Normalisations of the channels: mean and standard deviation of values between 0 and 1.
SCALES = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "unit": ((0.0,), (1.0,)),
    "signed": ((0.5,), (0.5,)),
    "raw": ((0.0,), (1 / 255,)),
}
CHECKED = 4  # real images that a graph is tried on
DATA_KEY = "ade_data"  # of an ONNX file's metadata: what data the network was trained on


class FeaturesError(UserError, ValueError):
    """A network that cannot give features, or a preprocessing that does not fit it."""


@dataclass(frozen=True)
class FeatureSource:
    """A network that gives features, and how to use it.

    Attributes:
        path: of an ONNX file with one input.
        output: name of the value that holds the features. The default is the output ``features``,
            or the input of the linear layer in which the graph ends, or the only output. The
            result of that layer is the logits, unless there is only one or a sigmoid follows, whose
            labels do not exclude each other.
        preprocess: see :data:`FORMAT`; ``SCALE`` is one of :data:`SCALES`, or mean and standard
            deviation by channel such as ``0.49 0.48 0.45/0.25 0.24 0.26``. A float input needs it;
            one of uint8 takes pixels as they are.
    """

    path: Path
    output: str | None = None
    preprocess: str | None = None
