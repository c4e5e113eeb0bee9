"""The log of a run: losses, held-out images and samples."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from ade_base.files import write_text
from training.data import Dataset
from training.evaluate import bpd_of, reconstruction_grid, sample_grid, sample_kinds
from training.runs import Progress
from training.step import Trainer

SELECT_IMAGES = 500


class RunLog:
    """Logs losses as JSON lines and to TensorBoard, and pictures to TensorBoard.

    Args:
        run: the run's folder.
        step: at which the run resumes; what was logged after it is forgotten.
    """

    def __init__(self, run: Path, step: int) -> None:
        path = run / "metrics.jsonl"
        kept: list[str] = []
        if path.exists():  # steps after the checkpoint will be logged again
            for line in path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(line)
                except ValueError:  # the line was cut off when the process was killed
                    break
        write_text(path, "".join(line + "\n" for line in kept))
        self._file = open(path, "a", buffering=1)
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def scalars(self, progress: Progress, values: dict[str, float]) -> None:
        """Log numbers by name."""
        row: dict[str, Any] = {**dataclasses.asdict(progress), **values}
        self._file.write(json.dumps(row) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, progress.step)
        self._board.add_scalar(
            "images_per_second", progress.images / max(progress.seconds, 1e-9), progress.step
        )

    def evaluate(self, trainer: Trainer, dataset: Dataset, progress: Progress) -> None:
        """Log held-out bits per dimension, reconstructions and samples of the averaged weights."""
        images = dataset.parts["select"].images[:SELECT_IMAGES]
        if len(images) and "score" in trainer.operations:
            bpd = bpd_of(trainer.ema, images, trainer.device, samples=1)
            self.scalars(progress, {"select_bpd": float(bpd.mean())})
            self._board.add_image(
                "reconstructions",
                reconstruction_grid(trainer.ema, images[:16], trainer.device),
                progress.step,
                dataformats="HWC",
            )
        for kind in sample_kinds(trainer.ema, trainer.operations):
            grid = sample_grid(trainer.ema, 64, trainer.device, with_noise=kind == "density")
            self._board.add_image(f"samples/{kind}", grid, progress.step, dataformats="HWC")

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        self._board.close()
