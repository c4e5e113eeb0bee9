"""How often the verdict rejects test images that a request resized, by size and filter.

CIFAR-10's test images are enlarged and resized as by a request, and judged by both calibrations of
the bundle: the one for resized images, and the one for images of the model's size.

    OMP_NUM_THREADS=1 python -m benchmarks.ood_resized pretrained/cifar10 --root DIR --ood SETS.npz
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.Image import Resampling

from export.gate.measuring import statistics_of
from export.gate.pair import resize_and_back
from serving.engine.engine import InferenceEngine
from serving.ingest.picture import Picture
from serving.verdict.false_alarms import false_alarm_band
from training.datasets import load_dataset

ALPHAS = (0.1, 0.05, 0.01)
COUNT, OOD_COUNT = 2000, 600
WAYS = (
    (48, Resampling.BICUBIC),
    (64, Resampling.BILINEAR),
    (64, Resampling.NEAREST),
    (224, Resampling.LANCZOS),
    (224, Resampling.BILINEAR),
    (24, Resampling.BICUBIC),
)


def resized(images: Iterable[np.ndarray], size: int, kind: Resampling) -> Iterator[np.ndarray]:
    """Square images of ``size``, uint8 ``(size, size, C)``, which a request resizes."""
    for image in images:
        yield np.asarray(Image.fromarray(image).resize((size, size), kind))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--root", required=True)
    parser.add_argument("--ood", type=Path, nargs="*", default=[], metavar="NPZ")
    args = parser.parse_args()
    engine = InferenceEngine(args.bundle, device="cpu", operations=["score"])
    test = load_dataset("cifar10", args.root).parts["test"].images[:COUNT]
    calibrations = engine.calibrations
    if calibrations.resized is None or calibrations.exact is None:
        parser.error(f"{args.bundle} must have calibrations for resized images and for others")
    judges = (calibrations.resized, calibrations.exact)

    def report(name: str, images: Iterable[np.ndarray | Picture]) -> None:
        statistics = statistics_of(engine, images, name, look_of=calibrations.look_of, resize=True)
        cells = []
        for judge in judges:
            p_values = np.array([verdict.p_value for verdict in judge.verdicts(statistics)])
            cells.append(" / ".join(f"{(p_values <= alpha).mean():.3f}" for alpha in ALPHAS))
        print(f"| {name} | {' | '.join(cells)} |", flush=True)

    alphas = " / ".join(map(str, ALPHAS))
    print(f"| rejected at alpha {alphas} | resized calibration | judged as if not resized |")
    print("|---|---|---|")
    report(
        "as the calibration simulates",
        (resize_and_back(image, calibrations.look_of(True)) for image in test),
    )
    for size, kind in WAYS:
        report(f"{size} pixels, {kind.name.lower()}", resized(test, size, kind))
    bands = [false_alarm_band(len(judges[0].scores), alpha, 0.95, len(test)) for alpha in ALPHAS]
    cells = " / ".join(f"{low:.3f} to {high:.3f}" for low, high in bands)
    print(f"| band of 95 %, of the resized calibration | {cells} | |")
    for path in args.ood:
        with np.load(path) as file:
            images = file["images"][:OOD_COUNT]
        report(f"{path.stem}, 48 pixels, bicubic", resized(images, 48, Resampling.BICUBIC))


if __name__ == "__main__":
    main()
