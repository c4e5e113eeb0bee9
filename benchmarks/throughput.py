"""Images a second: the engine in this process, and the service with it behind HTTP. ``make bench`` runs it.

Both are timed in turns in one run, on the example images that ship; medians over the turns and their ratio are
printed, for machines are noisy and shared.
"""

from __future__ import annotations

import argparse
import io
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np

from serving.engine import InferenceEngine
from serving.images import read_image
from serving.ui import EXAMPLES

TURNS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    args = parser.parse_args()
    engine = InferenceEngine(args.bundle, device="cpu")
    engine.warm_up()
    files = [np.resize(read_image(path.read_bytes()).pixels, engine.image_shape) for path in EXAMPLES]
    images = np.stack([files[i % len(files)] for i in range(256)])
    service = subprocess.Popen([sys.executable, "-m", "ade_cli.main", "serve", str(args.bundle), "--device", "cpu"],
                               stdout=subprocess.PIPE, text=True)
    assert service.stdout is not None
    for line in service.stdout:
        if line.startswith("API"):
            break
    url = f"http://127.0.0.1:{os.environ.get('ADE_INFERENCE_PORT', '8080')}/predictions"
    out = io.BytesIO()
    np.save(out, images)
    http = httpx.Client(timeout=300)
    cases: dict[str, tuple[int, Callable[[], object]]] = {
        "engine, score, batches of 1": (16, lambda: [engine.score(images[i:i + 1]) for i in range(16)]),
        "engine, score, batches of 32": (256, lambda: engine.score(images)),
        "engine, sample n=64": (64, lambda: engine.sample([0] * 64, range(64))),
        "HTTP, score, 256-image npy": (256, lambda: http.post(
            f"{url}/score", content=out.getvalue(), headers={"Content-Type": "application/x-npy"}).raise_for_status()),
        "HTTP, score, one PNG at a time": (16, lambda: [http.post(
            f"{url}/score", content=EXAMPLES[0].read_bytes()).raise_for_status() for _ in range(16)]),
        "HTTP, sample n=64": (64, lambda: http.post(
            f"{url}/sample", json={"n": 64, "seed": 0, "format": "npy"}).raise_for_status()),
    }
    rates: dict[str, list[float]] = {name: [] for name in cases}
    try:
        for _ in range(TURNS):
            for name, (count, call) in cases.items():
                started = time.perf_counter()
                call()
                rates[name].append(count / (time.perf_counter() - started))
    finally:
        service.terminate()
        service.wait()
    print(f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, {engine.backend.name}, medians of {TURNS} turns\n")
    print("| case | images/s | of the engine's batches of 32 |\n|---|---|---|")
    ceiling = statistics.median(rates["engine, score, batches of 32"])
    for name, values in rates.items():
        print(f"| {name} | {statistics.median(values):.0f} | {statistics.median(values) / ceiling:.2f} |")


if __name__ == "__main__":
    main()
