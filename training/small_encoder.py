"""A small encoder: a residual classifier of images with classes, for their pixels as they are.

It is trained for a number of minutes, and takes a quarter of the time of the larger network
(:mod:`training.encoder`) for each image. Beside the labels, it learns to predict what the larger
network sees in the same images.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from training.data import DataError, ImageSet, Report
from training.device import bfloat16_is_faster
from training.distillation import Distillation
from training.encoder import MIN_IMAGES, SEED, TrainedEncoder
from training.encoder_network import WIDTHS, SmallEncoder, check_size

BATCH = 128
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 5e-4
WARM_UP = 0.2  # of the steps' time; then the rate falls to zero
TEACHER_SHARE = 0.25  # of the training time that the teacher has at most
SHIFT = 8  # images are shifted by up to 1/SHIFT of half their side
DISTILLATION_WEIGHT = 10.0  # of a cosine distance, beside a cross-entropy
REPORT_SECONDS = 30.0


def train_small_encoder(
    images: ImageSet,
    minutes: float,
    device: torch.device,
    report: Report = lambda line: None,
) -> TrainedEncoder:
    """Train a small encoder.

    Args:
        images: the part ``train``, with labels; nothing that the verdict is fitted to or calibrated
            on.
        minutes: of training, by the clock; the learning rate follows it.
        device: where to train.
        report: called with each line of progress.

    Raises:
        DataError: images that are too small or too few, or labels of fewer than two kinds.
        FeatureError: the package with the larger network's weights is not installed.
    """
    if len(images) < MIN_IMAGES:
        raise DataError(f"an encoder needs at least {MIN_IMAGES} images, got {len(images)}")
    size, channels = images.images.shape[1], images.images.shape[3]
    check_size(size)
    if images.labels is None or len(np.unique(images.labels)) < 2:
        raise DataError("a small encoder needs images of two classes or more")
    kinds, numbers = np.unique(images.labels, return_inverse=True)
    labels, classes = torch.from_numpy(numbers), len(kinds)
    started = time.monotonic()
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        network = SmallEncoder(size, channels, classes)
        distillation = Distillation(images.images, WIDTHS[-1], 60 * TEACHER_SHARE * minutes, SEED)
    seen_by_teacher = len(distillation.rows)
    report(f"encoder: the larger network has seen {seen_by_teacher} of {len(images)} images")
    network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    distillation.to(device)
    optimizer = torch.optim.SGD(
        [*network.parameters(), *distillation.parameters()],
        LEARNING_RATE,
        MOMENTUM,
        weight_decay=WEIGHT_DECAY,
        nesterov=True,
    )
    draws = torch.Generator().manual_seed(SEED)
    in_bfloat16 = bfloat16_is_faster(device.type)
    network.train()
    seconds = 60 * minutes - min(time.monotonic() - started, 60 * TEACHER_SHARE * minutes)
    seen, started, told = 0, time.monotonic(), 0.0
    for rows in _batches(len(images)):
        elapsed = time.monotonic() - started
        done = elapsed / seconds
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(done / WARM_UP, (1 - done) / (1 - WARM_UP)) + 1e-5
        pixels = _varied(torch.from_numpy(np.asarray(images.images[rows])).float(), draws)
        with torch.autocast(device.type, torch.bfloat16, enabled=in_bfloat16):
            features, logits = network(pixels.to(device))
            loss = DISTILLATION_WEIGHT * distillation(features, torch.from_numpy(rows).to(device))
            loss += F.cross_entropy(logits, labels[rows].to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        seen += len(rows)
        if elapsed - told > REPORT_SECONDS:
            told = elapsed
            report(f"encoder: {100 * done:.0f} %, {seen} images, loss {loss.item():.3f}")
    return TrainedEncoder(network.cpu().float().eval().requires_grad_(False), seen, classes)


def _varied(pixels: Tensor, draws: torch.Generator) -> Tensor:
    """Flip and shift at random, ``(N, H, W, C)``."""
    count, height, width, channels = pixels.shape
    mirror = torch.where(torch.rand(count, generator=draws) < 0.5, -1.0, 1.0)
    across, down = (torch.rand(2, count, generator=draws) * 2 - 1) / SHIFT
    zeros = torch.zeros(count)
    grid = F.affine_grid(
        torch.stack(
            [torch.stack([mirror, zeros, across], 1), torch.stack([zeros, zeros + 1, down], 1)], 1
        ),
        [count, channels, height, width],
        align_corners=False,
    )
    moved = F.grid_sample(
        pixels.permute(0, 3, 1, 2),
        grid,
        mode="nearest",
        padding_mode="reflection",
        align_corners=False,
    )
    return moved.permute(0, 2, 3, 1)


def _batches(count: int) -> Iterator[np.ndarray]:
    """Rows, endlessly, each epoch in another order; a batch is never smaller than half."""
    epoch = 0
    while True:
        order = np.random.default_rng([SEED, epoch]).permutation(count)
        yield from (np.sort(rows) for rows in np.array_split(order, max(1, round(count / BATCH))))
        epoch += 1
