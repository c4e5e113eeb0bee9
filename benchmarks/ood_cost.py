"""The cost of a verdict: scoring with a calibration and without, measured in turns.

``python -m benchmarks.ood_cost pretrained/cifar10``
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from pathlib import Path

import numpy as np

from ade_base.pictures.read import read_image
from ade_base.pictures.show import lossless_bits
from ade_client.contract import DEFAULT
from serving.engine.engine import InferenceEngine
from serving.page.models import EXAMPLES
from serving.verdict.calibration_file import CalibrationPair

TURNS = 7
BATCH = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    args = parser.parse_args()
    engine = InferenceEngine(args.bundle, device="cpu", operations=["score"])
    engine.warm_up()
    bare = InferenceEngine(args.bundle, device="cpu", operations=["score"])
    bare.named = {DEFAULT: CalibrationPair()}
    bare.warm_up()
    examples = [
        np.resize(read_image(path.read_bytes()).pixels, engine.image_shape) for path in EXAMPLES
    ]
    images = np.stack([np.roll(examples[i % len(examples)], i, axis=1) for i in range(BATCH)])
    cases = {
        "bpd alone": lambda: bare.score(images),
        "with the verdict": lambda: engine.score(images),
        "its lossless code alone": lambda: [lossless_bits(image) for image in images],
    }
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(TURNS):
        for name, call in cases.items():
            started = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - started)
    ratios = [a / b for a, b in zip(seconds["with the verdict"], seconds["bpd alone"], strict=True)]
    print(
        f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, {engine.backend.name}, "
        f"one thread, {BATCH} images, medians of {TURNS} turns\n"
    )
    print("| case | ms per image |\n|---|---|")
    for name, values in seconds.items():
        print(f"| {name} | {1e3 * statistics.median(values) / BATCH:.2f} |")
    print(
        f"\nwith the verdict / bpd alone: {statistics.median(ratios):.3f} "
        f"({min(ratios):.3f} to {max(ratios):.3f})"
    )


if __name__ == "__main__":
    main()
