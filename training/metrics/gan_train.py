"""GAN-train: the accuracy of a classifier that learns from generated images.

Shmelkov et al., "How good is my GAN?", 2018. A classifier labels the samples; a small network
learns from them and is tested on real images. GAN-test, whether samples show the class that they
were generated for, is not defined for an unconditional model.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from training.encoder import linear_classifier

EPOCHS, BATCH, LEARNING_RATE = 8, 64, 2e-3
SEED = 0  # of weights, order and mirroring
LEAST_SPREAD = 0.05  # added to it: some features are nearly always zero


def _small_network(classes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for ins, outs in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(ins, outs, 3, stride=2, padding=1), nn.BatchNorm2d(outs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, classes))


def label_samples(known: np.ndarray, labels: np.ndarray, generated: np.ndarray) -> np.ndarray:
    """The classes of samples by a linear classifier of features.

    Args:
        known: features of real images, ``(N, F)``.
        labels: their classes, ``(N,)``, from 0.
        generated: features of samples, ``(M, F)``.

    Returns:
        ``(M,)``.
    """
    spread = known.std(0) + LEAST_SPREAD
    a, b = (torch.from_numpy((x / spread).astype(np.float32)) for x in (known, generated))
    classifier = linear_classifier(a, torch.from_numpy(labels), int(labels.max()) + 1)
    with torch.inference_mode():
        return np.asarray(classifier(b).argmax(1))


def gan_train_accuracy(
    images: np.ndarray,
    labels: np.ndarray,
    test_images: np.ndarray,
    test_labels: np.ndarray,
    device: torch.device,
) -> float:
    """Train a small network on some images and test it on others.

    Args:
        images: uint8 ``(N, H, W, 3)``, to learn from.
        labels: ``(N,)``, their classes.
        test_images: uint8 ``(M, H, W, 3)``, real images.
        test_labels: ``(M,)``, their classes.
        device: where to compute.

    Returns:
        Accuracy on the test images.
    """
    classes = int(max(labels.max(), test_labels.max())) + 1
    order = torch.Generator().manual_seed(SEED)
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        network = _small_network(classes).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    steps = EPOCHS * max(1, len(images) // BATCH)
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    pixels, targets = _tensor(images), torch.from_numpy(labels.astype(np.int64))
    network.train()
    for _ in range(EPOCHS):
        shuffled = torch.randperm(len(images), generator=order)
        for rows in shuffled[: max(1, len(images) // BATCH) * BATCH].split(BATCH):
            batch = pixels[rows].to(device).float() / 255 - 0.5
            mirrored = torch.rand(len(rows), 1, 1, 1, generator=order).to(device) < 0.5
            loss = F.cross_entropy(
                network(torch.where(mirrored, batch.flip(3), batch)), targets[rows].to(device)
            )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    network.eval()
    with torch.inference_mode():
        found = torch.cat(
            [
                network(batch.to(device).float() / 255 - 0.5).argmax(1).cpu()
                for batch in _tensor(test_images).split(500)
            ]
        )
    return float((found.numpy() == test_labels).mean())


def _tensor(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
