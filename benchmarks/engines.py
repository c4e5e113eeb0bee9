"""The engines of ``ade serve`` beside the bare engine, with one PNG per request.

``python -m benchmarks.engines pretrained/cifar10``. All services run at the same time, and all but
the one under test are idle. Each round measures all of them in turn; medians over the rounds are
printed. The processor time per image depends little on what else runs on the machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from benchmarks.serving import (
    CORES,
    WORKERS,
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
from serving.images import write_png

CLIENTS = (64, 1)


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
    args = parser.parse_args()
    engine = InferenceEngine(args.bundle, device="cpu", operations=["score"])
    images = example_images(engine.image_shape, 1)
    picture = write_png(images[0])
    rows: dict[tuple[int, str], Row] = {}

    def note(clients: int, who: str, outcome: Outcome) -> None:
        rows.setdefault((clients, who), Row()).outcomes.append(outcome)

    with ExitStack() as stack:
        services = []
        for name in args.engines:
            options = ("--engine", name, "--workers", str(WORKERS))
            service = stack.enter_context(running(args.bundle.resolve(), options=options))
            services.append(Server(name, service.process, service.url))
        all_engines = stack.enter_context(engines(args.bundle.resolve(), args.seconds))
        for round_ in range(args.rounds):
            print(f"round {round_ + 1} of {args.rounds}", file=sys.stderr, flush=True)
            note(64, "engine", all_engines())
            note(1, "engine", measure_engine(lambda: engine.score(images), 1, args.seconds))
            for clients in CLIENTS:
                for server in services:
                    load = one_image(server, picture, clients, seconds=args.seconds)
                    measure(server, dataclasses.replace(load, seconds=args.warm_up))
                    note(clients, server.name, measure(server, load))
    print(f"{CORES} cores, {WORKERS} workers, medians of {args.rounds} rounds\n")
    print(
        "| clients | engine | images/s | of the bare engine | p50 ms | CPU ms per image | errors |"
    )
    print("|---|---|---|---|---|---|---|")
    for clients in CLIENTS:
        bare = rows[clients, "engine"]
        for who in ("engine", *args.engines):
            row = rows[clients, who]
            # Within a round, since the machine may be slower in another.
            ratio = np.median(
                [
                    one.images_a_second / other.images_a_second
                    for one, other in zip(row.outcomes, bare.outcomes, strict=True)
                ]
            )
            print(
                f"| {clients} | {who} | {row.median(lambda o: o.images_a_second):.0f} "
                f"| {ratio:.2f} "
                f"| {row.median(lambda o: 1000 * float(np.median(o.latencies))):.1f} "
                f"| {row.median(lambda o: 1000 * o.server_cpu / o.images_a_second):.2f} "
                f"| {sum(o.errors for o in row.outcomes)} |"
            )


if __name__ == "__main__":
    main()
