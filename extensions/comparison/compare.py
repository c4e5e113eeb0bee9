"""Train several systems under one budget and measure them alike; resumable.

``OUT/runs/SYSTEM-seedN/`` is an ordinary run, plus ``measured.json`` once it is measured or
``failure.json`` if it failed. :mod:`extensions.comparison.report` writes the report.
``OUT/rows.json`` archives what the report shows of each run, so that a comparison can be resumed
after the folders of its runs are deleted.

Several processes may run the same comparison: each takes the next system that no other process
works on.
"""

from __future__ import annotations

import dataclasses
import gc
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from filelock import Timeout

from ade_base.files import LOCK, locked
from ade_model.checkpoint import load_model, read_config
from extensions.comparison.measure import PART, MeasureOptions, Measurer
from extensions.comparison.rows import (
    FAILURE,
    MEASURED,
    ROWS,
    Row,
    diverged,
    is_newer,
    kept_rows,
    run_row,
)
from training.config import TrainConfig
from training.data import Dataset, Report
from training.loop import train
from training.run_options import RunOptions
from training.run_start import check_budget, different_fields, open_run, resumed_options
from training.runs import RunError, latest_checkpoint, write_json


@dataclass(frozen=True)
class Job:
    """A system to train, with its budget."""

    config: TrainConfig
    options: RunOptions

    @property
    def name(self) -> str:
        return f"{self.config.recipe}-seed{self.options.seed}"

    def is_trained(self, row: Row) -> bool:
        """Whether a run has seen enough, by its images or the minutes that it was started with."""
        same_minutes = row.minutes_budget is not None and (
            row.minutes_budget == self.options.minutes
        )
        is_spent = row.has_seen(self.options.images) or (same_minutes and row.is_ended)
        return is_spent and (row.inferring_since is not None or not self.config.inference_share)


@dataclass(frozen=True)
class Comparison:
    """Several jobs on the same images.

    Attributes:
        dataset: for all jobs.
        source: where the data is, for each run's ``data.json``.
        out: the comparison's folder; jobs of earlier calls are kept in it.
        options: what to measure; a run that was measured with other options, or on another split,
            is measured again.
        device: where to measure.
        report: called with each line of progress.
    """

    dataset: Dataset
    source: dict[str, Any]
    out: Path
    options: MeasureOptions
    device: torch.device
    report: Report

    @cached_property
    def _measurer(self) -> Measurer:  # made when it is first needed
        return Measurer(self.dataset, self.device, self.options, self.report)

    @cached_property
    def _how(self) -> dict[str, Any]:
        return self.options.archived()

    def run(self, jobs: Sequence[Job]) -> list[str]:
        """Finish every unfinished job, in this order. A failure is recorded; the next job starts.

        Returns:
            The names of the jobs that failed, now or before.

        Raises:
            RunError: the folder holds a run or an archived row of the same name with another
                configuration, or a run that was interrupted beyond this budget but within its own;
                or one of its files is damaged.
        """
        kept = {row.name: row for row in kept_rows(self.out)}
        archived = {job.name for job in jobs if self._check(job, kept.get(job.name))}
        for job in jobs:
            if job.name in archived:
                self.report(f"{job.name}: finished before; its archived row is used")
                continue
            try:
                with locked(self._folder(job) / LOCK):
                    self._finish(job)
            except Timeout:
                self.report(f"{job.name}: another process works on it")
            gc.collect()
        others = [job for job in jobs if job.name not in archived]
        return [job.name for job in others if (self._folder(job) / FAILURE).is_file()]

    def _folder(self, job: Job) -> Path:
        return self.out / "runs" / job.name

    def _check(self, job: Job, kept: Row | None) -> bool:
        """Check that a run or, where its folder is gone, its archived row can become this job's.

        Returns:
            Whether the archived row is all that is needed.

        Raises:
            RunError: it cannot, and would be lost.
        """
        run = self._folder(job)
        has_run = (run / "run.json").is_file()
        row = run_row(run) if has_run else kept
        if row is None or not (has_run or row.images):
            return False
        different = different_fields(row.config, row.data, job.config, self.dataset.name)
        if different:
            raise RunError(
                f"{run if has_run else f'{job.name} in {self.out / ROWS}'} was trained with "
                f"{'; '.join(different)}: choose another folder for the comparison, or delete "
                f"the {'run' if has_run else 'row'}"
            )
        if self._is_archived(job, kept):
            return True
        if not has_run or diverged(run):  # it is not trained again
            return False
        if row.has_seen(job.options.images) and not row.is_ended:
            raise RunError(
                f"{run} was interrupted after {row.images:,} images, and was started with a budget "
                f"of {row.images_budget:,} images: finish it with that budget, delete it, or "
                "choose another folder for the comparison"
            )
        if not job.is_trained(row):
            options = resumed_options(run, job.options, resume=True)  # refuses other minutes
            check_budget(run, row.inferring_since, job.config.batch_size, options.images)
        return False

    def _is_archived(self, job: Job, kept: Row | None) -> bool:
        """Whether an archived row is all that a job needs."""
        return (
            kept is not None
            and not is_newer(self._folder(job), kept)
            and (kept.config, kept.data) == (job.config, self.dataset.name)
            and job.is_trained(kept)
            and self._is_measured(kept)
        )

    def _is_measured(self, row: Row) -> bool:
        """Whether a run was measured with these options on this part of the data."""
        found = row.measured
        return found is not None and (found.split, found.how) == (
            self.dataset.splits[PART],
            self._how,
        )

    def _finish(self, job: Job) -> None:
        """Train and measure one system; a failure is recorded, so that the next can start."""
        run = self._folder(job)
        if diverged(run):
            self.report(f"{job.name}: diverged before; delete {run} to try again")
            return
        (run / FAILURE).unlink(missing_ok=True)
        has_run = (run / "run.json").is_file()
        try:
            if not (has_run and job.is_trained(run_row(run))):
                self.report(f"{job.name}: training")
                train(job.config, self.dataset, run, job.options, has_run, self.source)
            if not self._is_measured(run_row(run)):
                self.report(f"{job.name}: measuring")
                folder = latest_checkpoint(run)
                model = load_model(folder).to(self.device)
                found = self._measurer.measure(model, read_config(folder), folder.name)
                write_json(run / MEASURED, dataclasses.asdict(found))
        except RunError:
            raise
        except Exception as error:  # any failure becomes a row of the report
            kind, why = type(error).__name__, str(error)
            self.report(f"{job.name}: {kind}: {why}")
            if not (run / "run.json").is_file():  # it failed before it began, and gets a row, too
                open_run(run, job.config, self.dataset, job.options, self.source)
            write_json(run / FAILURE, {"kind": kind, "why": why, "trace": traceback.format_exc()})
