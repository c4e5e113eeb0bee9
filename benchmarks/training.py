"""Speed and memory of training steps, compared with the peak of convolutions; and the loader.

``make bench-training``. The peak is measured in the same run, on a convolution that suits the
machine. Medians over steps are printed, since machines are noisy and shared. With ``--compile``,
compiled and eager networks are timed in turns.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from training.config import SIZES
from training.data import ImageSet
from training.datasets import load_dataset
from training.loop import make_fabric
from training.recipes import recipe
from training.step import Trainer

STEPS = 5
PEAK_SHAPES = ((256, 8), (128, 16), (64, 32))  # channels, size


class _Counter(TorchDispatchMode):
    """Counts multiplications and additions; PyTorch's own FLOP counter fails on hooks here."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        if function._overloadpacket in flop_registry:
            self.total += flop_registry[function._overloadpacket](
                *args, **(kwargs or {}), out_val=result
            )
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", nargs="+", default=["v-ade", "av-ade"])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--compile", action="store_true", help="time compiled passes beside eager ones"
    )
    args = parser.parse_args()
    fabric = make_fabric(args.device, "auto")
    print(
        f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, "
        f"{torch.get_num_threads()} threads, {fabric.device}, "
        f"precision {fabric._precision.precision}, torch {torch.__version__}"
    )
    dtype = torch.bfloat16 if "bf16" in str(fabric._precision.precision) else torch.float32
    peak = max(
        _convolution_speed(channels, size, dtype, fabric.device) for channels, size in PEAK_SHAPES
    )
    print(f"peak of convolutions, forward and backward: {peak / 1e9:.0f} GFLOP/s\n")
    print(
        f"{'system':22s} {'images/s':>9s} {'GFLOP/s':>8s} {'of peak':>8s} {'GFLOP/image':>12s} "
        f"{'memory so far':>14s}"
    )
    for size in args.sizes:
        for name in args.recipes:
            trainers = {name: _trainer(name, size, fabric)}
            if args.compile:
                trainers[f"{name} compiled"] = _compiled(_trainer(name, size, fabric))
            _measure(trainers, size, peak, fabric.device)
    _loader()


def _convolution_speed(channels: int, size: int, dtype: torch.dtype, device: torch.device) -> float:
    """Operations per second of a 3x3 convolution, forward and backward."""
    conv = torch.nn.Conv2d(channels, channels, 3, padding=1).to(
        device, dtype, memory_format=torch.channels_last
    )
    x = torch.randn(64, channels, size, size, device=device, dtype=dtype).contiguous(
        memory_format=torch.channels_last
    )
    x.requires_grad_(True)

    def once() -> None:
        conv(x).sum().backward()

    once()
    seconds = statistics.median(_timed(once, device) for _ in range(7))
    return 3 * 2 * 64 * size**2 * 9 * channels**2 / seconds


def _timed(call: object, device: torch.device) -> float:
    started = time.perf_counter()
    call()  # type: ignore[operator]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _trainer(name: str, size: str, fabric: object) -> Trainer:
    return Trainer(recipe(name, 32, 3, size), fabric.device, fabric.autocast, lambda flat: flat, 0)  # type: ignore[attr-defined]


def _compiled(trainer: Trainer) -> Trainer:
    for method in ("elbo_terms_with_analytic_kl", "sample"):
        setattr(trainer.model, method, torch.compile(getattr(trainer.model, method)))
    return trainer


def _measure(trainers: dict[str, Trainer], size: str, peak: float, device: torch.device) -> None:
    config = next(iter(trainers.values())).config
    batches = [
        torch.randint(0, 256, (config.batch_size, 32, 32, 3), dtype=torch.uint8)
        for _ in range(2 if config.discriminator else 1)
    ]
    with _Counter() as counter:
        # As many steps as there are between gradient penalties, so that one is included.
        for _ in range(config.gp_every):
            next(iter(trainers.values())).run(batches)
    operations = counter.total / config.gp_every
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for trainer in trainers.values():
        trainer.run(batches)
    for _ in range(STEPS):
        for name, trainer in trainers.items():
            seconds[name].append(
                _timed(lambda t=trainer: [t.run(batches) for _ in range(config.gp_every)], device)
                / config.gp_every
            )
    for name, times in seconds.items():
        median = statistics.median(times)
        memory = (
            torch.cuda.max_memory_allocated(device)
            if device.type == "cuda"
            else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        )
        print(
            f"{name + ', ' + size:22s} {config.batch_size / median:9.0f} "
            f"{operations / median / 1e9:8.0f} {operations / median / peak:8.0%} "
            f"{operations / config.batch_size / 1e9:12.2f} {memory / 2**20:10.0f} MiB",
            flush=True,
        )


def _loader() -> None:
    """Print the images per second of a loader, which must be far above the rates of training."""
    pixels = np.random.default_rng(0).integers(0, 256, (20_000, 32, 32, 3), dtype=np.uint8)
    print(
        f"\nloader, batches of 64: {_rate(ImageSet(pixels)):,.0f} images/s from memory",
        end="",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        for i, image in enumerate(pixels[:2000]):
            Image.fromarray(image).save(Path(folder) / f"{i}.bmp")
        dataset = load_dataset(folder, None, 32, cache=Path(folder) / "cache")
        print(f", {_rate(dataset.parts['train']):,.0f} from a folder's cache")


def _rate(images: ImageSet) -> float:
    batches = images.batches(64, 0)
    next(batches)
    started = time.perf_counter()
    for _ in range(500):
        next(batches)
    return 500 * 64 / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
