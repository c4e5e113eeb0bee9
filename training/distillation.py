"""What an encoder learns beside its labels: the features of a larger network, of the same images.

Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, with features instead of class
probabilities (Romero et al., "FitNets: Hints for Thin Deep Nets", 2015). The teacher is an
ImageNet classifier, so the encoder learns differences between things for which the images at hand
have no labels.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.data import Rows
from training.metrics.efficientnet import BATCH, FEATURES, EfficientNetFeatures

TEACHER_SIZE = 160  # pixels per side of the teacher's input


class Distillation(nn.Module):
    """A loss: how far features are from predicting the teacher's features of the same images.

    The teacher sees each image once, before training. Its features are compared by direction, after
    subtraction of their mean.

    Args:
        images: uint8 ``(N, H, W, 3)``.
        width: of the features that predict.
        seconds: by the clock that the teacher has at most; it always sees one batch.
        seed: of the order in which the teacher sees the images, if the time is too short for all.

    Attributes:
        rows: of the images that the teacher saw, in ascending order.

    Raises:
        FeatureError: the package with the teacher's weights is not installed.
    """

    targets: Tensor
    places: Tensor

    def __init__(self, images: np.ndarray | Rows, width: int, seconds: float, seed: int) -> None:
        super().__init__()
        self.predict = nn.Linear(width, FEATURES)
        teacher = EfficientNetFeatures(TEACHER_SIZE)
        order = np.random.default_rng(seed).permutation(len(images))
        found: list[Tensor] = []
        started = time.monotonic()
        while BATCH * len(found) < len(images):
            rows = np.sort(order[BATCH * len(found) :][:BATCH])
            order[BATCH * len(found) :][:BATCH] = rows
            found.append(torch.from_numpy(teacher(np.asarray(images[rows]))).float())
            if time.monotonic() - started > seconds:
                break
        features = torch.cat(found)
        self.rows = np.sort(order[: len(features)])
        places = torch.full((len(images),), -1)
        places[torch.from_numpy(order[: len(features)])] = torch.arange(len(features))
        self.register_buffer("places", places)
        self.register_buffer("targets", F.normalize(features - features.mean(0), dim=1).half())

    def forward(self, features: Tensor, rows: Tensor) -> Tensor:
        """Mean cosine distance, of the images that the teacher saw; zero of others.

        Args:
            features: ``(N, F)``, of images of the rows.
            rows: ``(N,)``.
        """
        places = self.places[rows]
        similarity = F.cosine_similarity(
            self.predict(features).float(), self.targets[places].float()
        )
        return torch.where(places < 0, 0, 1 - similarity).mean()
