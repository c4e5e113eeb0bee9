"""The engines of ``ade serve`` beside the bare engine, with one PNG per request.

``python -m benchmarks.engines pretrained/cifar10``; with ``--megabytes 0.8 10`` also with large
photographs, which the service resizes. All services run at the same time, and all but
the one under test are idle. Each round measures all of them in turn; medians over the rounds are
printed. The processor time per image depends little on what else runs on the machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import math
import sys
from contextlib import ExitStack
from pathlib import Path

import httpx
import numpy as np
from PIL import Image

from ade_base.pictures.show import write_png
from benchmarks.serving import (
    CORES,
    WORKERS,
    Load,
    Outcome,
    Row,
    Server,
    engines,
    example_images,
    measure,
    measure_engine,
    one_image,
)
from benchmarks.traffic import running
from handlers.launch.engines import ENGINES
from serving.engine.engine import InferenceEngine

CLIENTS = (64, 1)
LARGE_CLIENTS = 8  # with large bodies: the service holds 256 MiB of them


def photograph(megabytes: float, image: np.ndarray, seconds: float) -> Load:
    """Requests with one BMP file of about this size, which is resized."""
    side = round(math.sqrt(megabytes * 1e6 / 3))
    file = io.BytesIO()
    Image.fromarray(image).resize((side, side)).save(file, "BMP")
    form = httpx.Request(
        "POST",
        "http://localhost",
        data={"resize": "fit"},
        files={"image": ("photograph.bmp", file.getvalue(), "image/bmp")},
    )
    name = f"score, {megabytes:g} MB, {LARGE_CLIENTS} clients"
    kind = form.headers["content-type"]
    return Load(name, "score", form.read(), kind, 1, LARGE_CLIENTS, seconds=seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each case in a round")
    parser.add_argument(
        "--warm-up",
        type=float,
        default=20.0,
        metavar="SECONDS",
        help="of load before each case, in which Ray starts replicas (default: %(default)s)",
    )
    parser.add_argument(
        "--megabytes", type=float, nargs="+", default=[], help="sizes of photographs to send, too"
    )
    args = parser.parse_args()
    engine = InferenceEngine(args.bundle, device="cpu", operations=["score"])
    images = example_images(engine.image_shape, 1)
    picture = write_png(images[0])
    large = [photograph(size, images[0], args.seconds) for size in args.megabytes]
    rows: dict[tuple[str, str], Row] = {}

    def note(case: str, who: str, outcome: Outcome) -> None:
        rows.setdefault((case, who), Row()).outcomes.append(outcome)

    with ExitStack() as stack:
        services = []
        for name in args.engines:
            options = ("--engine", name, "--workers", str(WORKERS))
            service = stack.enter_context(running(args.bundle.resolve(), options=options))
            services.append(Server(name, service.process, service.url))
        all_engines = stack.enter_context(engines(args.bundle.resolve(), args.seconds))
        for round_ in range(args.rounds):
            print(f"round {round_ + 1} of {args.rounds}", file=sys.stderr, flush=True)
            for clients in CLIENTS:
                alone = (
                    all_engines()
                    if clients > 1
                    else measure_engine(lambda: engine.score(images), 1, args.seconds)
                )
                for server in services:
                    load = one_image(server, picture, clients, seconds=args.seconds)
                    measure(server, dataclasses.replace(load, seconds=args.warm_up))
                    note(load.name, server.name, measure(server, load))
                note(load.name, "engine", alone)
            for load in large:
                for server in services:
                    measure(server, dataclasses.replace(load, seconds=args.warm_up))
                    note(load.name, server.name, measure(server, load))
    print(f"{CORES} cores, {WORKERS} workers, medians of {args.rounds} rounds\n")
    print("| case | engine | images/s | of the bare engine | p50 ms | CPU ms per image | errors |")
    print("|---|---|---|---|---|---|---|")
    for case in dict.fromkeys(case for case, _ in rows):
        bare = rows.get((case, "engine"))
        for who in ("engine", *args.engines):
            row = rows.get((case, who))
            if row is None:  # the bare engine decodes no photographs
                continue
            # Within a round, since the machine may be slower in another.
            ratio = "–" if bare is None else f"{_ratio(row, bare):.2f}"
            print(
                f"| {case} | {who} | {row.median(lambda o: o.images_a_second):.0f} "
                f"| {ratio} "
                f"| {row.median(lambda o: 1000 * float(np.median(o.latencies))):.1f} "
                f"| {row.median(lambda o: 1000 * o.server_cpu / o.images_a_second):.2f} "
                f"| {sum(o.errors for o in row.outcomes)} |"
            )


def _ratio(row: Row, bare: Row) -> float:
    ratios = [
        one.images_a_second / other.images_a_second
        for one, other in zip(row.outcomes, bare.outcomes, strict=True)
    ]
    return float(np.median(ratios))


if __name__ == "__main__":
    main()
