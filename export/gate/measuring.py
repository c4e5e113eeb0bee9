"""Computes the statistics of many images with the serving engine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import length_hint
from typing import NamedTuple

import numpy as np

from export.gate.images import (
    MAX_THREADS,
    Images,
    Prepared,
    bar,
    none_usable,
    prepared,
    report_left_out,
    thread_pool,
)
from serving.engine.engine import MAX_ROWS, InferenceEngine
from serving.ingest.picture import LookOf, Picture, no_look
from serving.verdict.encoder import EncoderMemory
from serving.verdict.statistics import finite_rows
from training.data import Report

CHUNK = MAX_THREADS * MAX_ROWS


class Measured(NamedTuple):
    """The statistics of images by name, each ``(N, …)``, and which were resized, bool ``(N,)``."""

    statistics: dict[str, np.ndarray]
    resized: np.ndarray


def statistics_of(
    engine: InferenceEngine,
    images: Images,
    name: str,
    report: Report = lambda line: None,
    memory: EncoderMemory | None = None,
    look_of: LookOf = no_look,
    resize: bool = False,
) -> dict[str, np.ndarray]:
    """The statistics of images, by name; see :func:`prepared` and :func:`measured`."""
    them = prepared(images, engine.image_shape, resize, look_of)
    total = length_hint(images) or None
    return measured(engine, them, name, report, (memory, memory), total).statistics


def measured(
    engine: InferenceEngine,
    images: Iterable[Prepared],
    name: str,
    report: Report,
    memories: tuple[EncoderMemory | None, EncoderMemory | None] = (None, None),
    total: int | None = None,
) -> Measured:
    """Compute the statistics of many images, a chunk at a time.

    Images that a request could not use are left out. Each core computes batches of its own: a graph
    runs in a single thread, and no image depends on the others.

    Args:
        engine: with ``score``.
        images: see :func:`export.gate.images.prepared`.
        name: of the images, for progress and errors.
        report: called with a line if images are left out.
        memories: measure patches at once, which take much memory, of images of the model's size and
            of resized ones. A statistic that only one kind has is 0 for the other.
        total: number of the images, if it is known, for the progress bar.

    Raises:
        CalibrationError: no image could be used.
    """
    are_apart = memories[0] is not memories[1]

    def statistics(batch: Sequence[Picture]) -> dict[str, np.ndarray]:
        views = [image.view for image in batch if image.view is not None]
        found = engine.statistics(np.stack([image.pixels for image in batch]), views)
        memory = memories[batch[0].resized]
        return found if memory is None else memory.measured(found)

    chunks: list[dict[str, np.ndarray]] = []
    resized: list[bool] = []
    errors: list[tuple[str, str]] = []
    kinds: tuple[list[tuple[str, Picture]], ...] = [], []

    def flush(waiting: list[tuple[str, Picture]]) -> None:
        if waiting:
            them = [image for _, image in waiting]
            batches = [them[i : i + MAX_ROWS] for i in range(0, len(them), MAX_ROWS)]
            found = _joined(list(threads.map(statistics, batches)))
            finite = finite_rows(found)
            errors.extend(
                (waiting[row][0], "its likelihood or another statistic is not a finite number")
                for row in np.flatnonzero(~finite)
            )
            if finite.any():
                chunks.append({key: values[finite] for key, values in found.items()})
                resized.extend(waiting[row][1].resized for row in np.flatnonzero(finite))
            shown.update(len(waiting))
            waiting.clear()

    with thread_pool() as threads, bar(name, total) as shown:
        for its, image in images:
            if isinstance(image, Picture):
                waiting = kinds[are_apart and image.resized]
                waiting.append((its, image))
                if len(waiting) == CHUNK:
                    flush(waiting)
            else:
                errors.append((its, image.message))
        for waiting in kinds:
            flush(waiting)
    report_left_out(name, errors, report)
    if not chunks:
        raise none_usable(name, errors)
    return Measured(_joined(chunks), np.array(resized))


def _joined(batches: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    some = {key: values[:1] for batch in batches for key, values in batch.items()}
    return {
        key: np.concatenate(
            [
                batch[key] if key in batch else np.repeat(np.zeros_like(its), len(batch["bpd"]), 0)
                for batch in batches
            ]
        )
        for key, its in some.items()
    }
