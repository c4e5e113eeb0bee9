"""An encoder for the verdict: a small residual classifier, or without labels a larger network.

The generative model's statistics describe colours, edges and textures; they hardly depend on the
object in the image. Features that tell classes apart do. The classifier is trained for a number of
minutes, on the training images alone: the verdict's calibration needs images that it has not seen.
Beside the images' labels, it learns to predict what the larger network sees in the same images.
Without labels that network itself is the encoder (:mod:`training.imagenet_encoder`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.data import DataError, Dataset, ImageSet
from training.device import bfloat16_is_faster
from training.distillation import Distillation
from training.encoder_network import WIDTHS, Encoder, check_size
from training.imagenet_encoder import imagenet_encoder

BATCH = 128
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 5e-4
WARM_UP = 0.2  # of the steps' time; then the rate falls to zero
TEACHER_SHARE = 0.25  # of the training time that the teacher has at most
SHIFT = 8  # images are shifted by up to 1/SHIFT of half their side
DISTILLATION_WEIGHT = 10.0  # of a cosine distance, beside a cross-entropy
MIN_IMAGES = 8
REPORT_SECONDS = 30.0
IMAGES_A_CLASS = 20
SPLITS = {"train", "val", "valid", "validation", "test"}
LISTED = 10  # names of classes

Report = Callable[[str], None]


@dataclass(frozen=True)
class TrainedEncoder:
    """An encoder in evaluation mode, and how it came about.

    Attributes:
        network: on the CPU.
        images_seen: in training, with repetition; without labels, those that gave the spread.
        classes: 0 without labels.
    """

    network: nn.Module
    images_seen: int
    classes: int

    @property
    def outputs(self) -> list[str]:
        """Names of what the network gives, those of a bundle's ``features`` graph."""
        return ["features", "logits"][: 2 if self.classes else 1]


def class_folders(names: Sequence[str]) -> list[str] | None:
    """Names of the folders of a data set, in order, if each is a class.

    Folders above them may hold everything, such as ``images``, or be called ``train``, ``val``,
    ``valid``, ``validation`` and ``test``.

    Args:
        names: of the images to train on, relative to the data set, with ``/``.

    Returns:
        ``None`` if there are fewer than two folders, if an image lies outside them, or if folders
        have fewer than 20 images on average.
    """
    depth = _class_depth(names)
    folders = sorted({_folder(name, depth) for name in names})
    if "" in folders or len(folders) < 2 or len(names) < IMAGES_A_CLASS * len(folders):
        return None
    return folders


def _class_depth(names: Sequence[str]) -> int:
    """The number of folders above the class folders."""
    depth = 0
    while True:
        folders = {_folder(name, depth) for name in names}
        are_splits = {folder.lower() for folder in folders} <= SPLITS
        if not folders or "" in folders or not (len(folders) == 1 or are_splits):
            return depth
        depth += 1


def _folder(name: str, depth: int) -> str:
    """The folder of a path at a depth, from 0; empty if the path has fewer."""
    folders = name.split("/")[:-1]
    return folders[depth] if depth < len(folders) else ""


def listed(folders: Sequence[str]) -> str:
    """The first names of class folders, for the user."""
    more = len(folders) - LISTED
    return ", ".join(folders[:LISTED]) + (f" and {more} more" if more > 0 else "")


def class_labels(dataset: Dataset, part: str = "train") -> np.ndarray | None:
    """Classes of the images of a part: the data set's, or of a folder its :func:`class_folders`.

    Returns:
        int ``(N,)``, -1 for a class that the part ``train`` does not have; ``None`` if there are no
        classes.
    """
    if dataset.parts["train"].labels is not None:
        return dataset.parts[part].labels
    names = dataset.files.get("train", [])
    folders = class_folders(names)
    if folders is None:
        return None
    number = {folder: i for i, folder in enumerate(folders)}
    depth = _class_depth(names)
    return np.array([number.get(_folder(name, depth), -1) for name in dataset.files[part]])


def train_encoder(
    images: ImageSet,
    minutes: float,
    device: torch.device,
    seed: int = 0,
    report: Report = lambda line: None,
) -> TrainedEncoder:
    """Train an encoder with the images' labels, if they have any of two kinds or more.

    Args:
        images: the part ``train``; nothing that the verdict is fitted to or calibrated on.
        minutes: of training, by the clock; the learning rate follows it. Without labels nothing is
            trained.
        device: where to train.
        seed: of weights, order and augmentation.
        report: called with each line of progress.

    Raises:
        DataError: images that are too small or too few.
        FeatureError: the package with the larger network's weights is not installed.
    """
    if len(images) < MIN_IMAGES:
        raise DataError(f"an encoder needs at least {MIN_IMAGES} images, got {len(images)}")
    size, channels = images.images.shape[1], images.images.shape[3]
    check_size(size)
    if images.labels is None or len(np.unique(images.labels)) < 2:
        whole, seen = imagenet_encoder(images.images, seed)
        return TrainedEncoder(whole, seen, 0)
    kinds, numbers = np.unique(images.labels, return_inverse=True)
    labels, classes = torch.from_numpy(numbers), len(kinds)
    started = time.monotonic()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = Encoder(size, channels, classes)
        distillation = Distillation(images.images, WIDTHS[-1], 60 * TEACHER_SHARE * minutes, seed)
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
    draws = torch.Generator().manual_seed(seed)
    in_bfloat16 = bfloat16_is_faster(device.type)
    network.train()
    seconds = 60 * minutes - min(time.monotonic() - started, 60 * TEACHER_SHARE * minutes)
    seen, started, told = 0, time.monotonic(), 0.0
    for rows in _batches(len(images), seed):
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


def _batches(count: int, seed: int) -> Iterator[np.ndarray]:
    """Rows, endlessly, each epoch in another order; a batch is never smaller than half."""
    epoch = 0
    while True:
        order = np.random.default_rng([seed, epoch]).permutation(count)
        yield from (np.sort(rows) for rows in np.array_split(order, max(1, round(count / BATCH))))
        epoch += 1
