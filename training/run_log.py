"""The log of a run: losses, its curve, held-out images and samples."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, TextIO

from torch.utils.tensorboard import SummaryWriter

from ade_base.files import write_text
from training.curve import curve_point
from training.data import Dataset
from training.evaluate import reconstruction_grid, sample_grid, sample_kinds
from training.runs import Progress
from training.step import Trainer

LOGS = ("metrics", "curve")


class RunLog:
    """Logs losses and the curve as JSON lines and to TensorBoard, and pictures to TensorBoard.

    Args:
        run: the run's folder.
        step: at which the run resumes; what was logged after it is forgotten.
    """

    def __init__(self, run: Path, step: int) -> None:
        self._losses, self._curve = (_opened(run / f"{name}.jsonl", step) for name in LOGS)
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def scalars(self, progress: Progress, values: dict[str, float]) -> None:
        """Log losses by name."""
        self._write(self._losses, progress, values)

    def _write(self, file: TextIO, progress: Progress, values: dict[str, float]) -> None:
        row: dict[str, Any] = {**dataclasses.asdict(progress), **values}
        file.write(json.dumps(row) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, progress.step)
        self._board.add_scalar(
            "images_per_second", progress.images / max(progress.seconds, 1e-9), progress.step
        )

    def evaluate(self, trainer: Trainer, dataset: Dataset, progress: Progress) -> None:
        """Log a point of the curve, reconstructions and samples of the averaged weights."""
        self._write(self._curve, progress, curve_point(trainer, dataset))
        images = dataset.parts["select"].images[:16]
        if len(images) and "score" in trainer.operations:
            self._board.add_image(
                "reconstructions",
                reconstruction_grid(trainer.ema, images, trainer.device),
                progress.step,
                dataformats="HWC",
            )
        for kind in sample_kinds(trainer.ema, trainer.operations):
            grid = sample_grid(trainer.ema, 64, trainer.device, with_noise=kind == "density")
            self._board.add_image(f"samples/{kind}", grid, progress.step, dataformats="HWC")

    def close(self) -> None:
        """Close the files."""
        self._losses.close()
        self._curve.close()
        self._board.close()


def _opened(path: Path, step: int) -> TextIO:
    """Open a file of JSON lines to append to it, without those after a step: they come again."""
    kept: list[str] = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except ValueError:  # the line was cut off when the process was killed
            break
    write_text(path, "".join(line + "\n" for line in kept))
    return open(path, "a", buffering=1)
