"""A small encoder for the verdict: a residual classifier, or a contrastive network without labels.

The generative model's statistics describe colours, edges and textures; they hardly depend on the
object in the image. Features that tell classes apart do. The network is small, because every score
pays for it: about 45 million multiply-adds for 32x32 pixels. It is trained for a number of minutes,
on the training images alone: the verdict's calibration needs images that it has not seen.
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

WIDTHS = (32, 128, 256)
STEM = 32
MAX_SIZE = 32  # images of 64 pixels or more are averaged down; the network sees fewer than 64
MIN_SIZE = 8
BATCH = 128
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 5e-4
WARM_UP = 0.2  # of the training time; then the rate falls to zero
SHIFT = 8  # images are shifted by up to 1/SHIFT of half their side
TEMPERATURE = 0.3
PROJECTION = 64
ROTATIONS = 4
REPORT_SECONDS = 30.0
IMAGES_A_CLASS = 20
SPLITS = {"train", "val", "valid", "validation", "test"}
LISTED = 10  # names of classes

Report = Callable[[str], None]


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


class Encoder(nn.Module):
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
        x = images.permute(0, 3, 1, 2).float() / 64 - 2
        x = F.avg_pool2d(x, self.shrink) if self.shrink > 1 else x
        x = self.blocks(F.relu(self.norm(self.stem(x))))
        pooled: Tensor = x.mean((2, 3))
        return pooled

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """What the exported graph gives: features, and logits if there are classes."""
        features = self.features(images)
        return (features,) if self.classifier is None else (features, self.classifier(features))


@dataclass(frozen=True)
class TrainedEncoder:
    """An encoder in evaluation mode, and how it came about.

    Attributes:
        network: on the CPU.
        images_seen: with repetition.
        classes: 0 without labels.
    """

    network: Encoder
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
    """Train an encoder: with the images' labels if they have any of two kinds or more.

    Args:
        images: the part ``train``; nothing that the verdict is fitted to or calibrated on.
        minutes: of training, by the clock; the learning rate follows it.
        device: where to train.
        seed: of weights, order and augmentation.
        report: called with each line of progress.

    Raises:
        DataError: images that are too small or too few.
    """
    if len(images) < 2 * ROTATIONS:
        raise DataError(f"an encoder needs at least {2 * ROTATIONS} images, got {len(images)}")
    labels = None if images.labels is None else np.unique(images.labels, return_inverse=True)[1]
    classes = 0 if labels is None else int(labels.max()) + 1
    if classes < 2:
        labels, classes = None, 0
    size, channels = images.images.shape[1], images.images.shape[3]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = Encoder(size, channels, classes)
        head: nn.Module = nn.Identity()
        if labels is None:
            width = WIDTHS[-1]
            head = nn.ModuleDict(
                {
                    "project": nn.Sequential(
                        nn.Linear(width, width), nn.ReLU(), nn.Linear(width, PROJECTION)
                    ),
                    "rotation": nn.Linear(width, ROTATIONS),
                }
            )
    network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    head.to(device)
    parameters = [*network.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(
        parameters, LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True
    )
    draws = torch.Generator().manual_seed(seed)
    in_bfloat16 = bfloat16_is_faster(device.type)
    network.train()
    seen, started, told = 0, time.monotonic(), 0.0
    for rows in _batches(len(images), seed):
        elapsed = time.monotonic() - started
        done = elapsed / (60 * minutes)
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(done / WARM_UP, (1 - done) / (1 - WARM_UP)) + 1e-5
        pixels = torch.from_numpy(np.asarray(images.images[rows])).float()
        with torch.autocast(device.type, torch.bfloat16, enabled=in_bfloat16):
            if labels is None:
                loss = _loss_without_labels(network, head, pixels, device, draws)
            else:
                logits = network(_varied(pixels, draws).to(device))[1]
                loss = F.cross_entropy(logits, torch.from_numpy(labels[rows]).to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        seen += len(rows)
        if elapsed - told > REPORT_SECONDS:
            told = elapsed
            report(f"encoder: {100 * done:.0f} %, {seen} images, loss {loss.item():.3f}")
    return TrainedEncoder(network.cpu().float().eval().requires_grad_(False), seen, classes)


def _loss_without_labels(
    network: Encoder, head: nn.Module, pixels: Tensor, device: torch.device, draws: torch.Generator
) -> Tensor:
    """Loss of two views of an image that should be alike, and unlike all other images.

    A rotated image counts as another one, and its angle is predicted.

    Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", 2020, with
    the rotations of Tack et al., "CSI: Novelty Detection via Contrastive Learning on
    Distributionally Shifted Instances", 2020.
    """
    assert isinstance(head, nn.ModuleDict)
    turns = torch.randint(ROTATIONS, (len(pixels),), generator=draws)
    turned = torch.stack(
        [image.rot90(int(turn), (0, 1)) for image, turn in zip(pixels, turns, strict=True)]
    )
    views = torch.cat([_varied(turned, draws, colours=True) for _ in range(2)]).to(device)
    features = network.features(views)
    rotation = F.cross_entropy(head["rotation"](features), turns.repeat(2).to(device))
    projected = F.normalize(head["project"](features).float(), dim=1)
    alike = projected @ projected.t() / TEMPERATURE
    alike.fill_diagonal_(-torch.inf)
    partners = torch.arange(len(views), device=device).roll(len(pixels))
    return F.cross_entropy(alike, partners) + rotation


def _varied(pixels: Tensor, draws: torch.Generator, colours: bool = False) -> Tensor:
    """Flip and shift at random, ``(N, H, W, C)``; with ``colours`` crop and recolour as well."""
    count, height, width, channels = pixels.shape

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=draws) * (high - low) + low

    scale = uniform(0.5, 1.0) if colours else torch.ones(count)
    room = 1 - scale if colours else torch.full((count,), 1 / SHIFT)
    mirror = torch.where(torch.rand(count, generator=draws) < 0.5, -1.0, 1.0)
    zeros = torch.zeros(count)
    grid = F.affine_grid(
        torch.stack(
            [
                torch.stack([scale * mirror, zeros, room * uniform(-1, 1)], 1),
                torch.stack([zeros, scale, room * uniform(-1, 1)], 1),
            ],
            1,
        ),
        [count, channels, height, width],
        align_corners=False,
    )
    moved = F.grid_sample(
        pixels.permute(0, 3, 1, 2),
        grid,
        mode="bilinear" if colours else "nearest",
        padding_mode="reflection",
        align_corners=False,
    ).permute(0, 2, 3, 1)
    if not colours:
        return moved
    mean = moved.mean((1, 2, 3), keepdim=True)
    moved = (moved - mean) * uniform(0.6, 1.4, 1, 1, 1) + mean * uniform(0.6, 1.4, 1, 1, 1)
    grey = moved.mean(3, keepdim=True)
    saturation = uniform(0.0, 1.6, 1, 1, 1)
    tint = uniform(0.85, 1.15, 1, 1, channels)
    return ((grey + (moved - grey) * saturation) * tint).clamp(0, 255)


def _batches(count: int, seed: int) -> Iterator[np.ndarray]:
    """Rows, endlessly, each epoch in another order; a batch is never smaller than half."""
    epoch = 0
    while True:
        order = np.random.default_rng([seed, epoch]).permutation(count)
        yield from (np.sort(rows) for rows in np.array_split(order, max(1, round(count / BATCH))))
        epoch += 1
