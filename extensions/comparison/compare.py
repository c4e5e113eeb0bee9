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
import functools
import gc
import json
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import Timeout

from ade_base.files import LOCK, locked, write_text
from ade_model.checkpoint import load_model, read_config
from extensions.comparison.measure import MeasureOptions, Measurer
from extensions.comparison.resnet20 import ResNet20
from training.config import TrainConfig
from training.data import Dataset
from training.loop import train
from training.run_options import RunOptions
from training.run_start import check_budget, different_fields, open_run, read_started
from training.runs import (
    RunError,
    checkpoint_folders,
    latest_checkpoint,
    read_json,
    read_state,
    write_json,
)
from training.step import TrainingDiverged

MEASURED, FAILURE, ROWS = "measured.json", "failure.json", "rows.json"
CURVES = ("bpd", "quality_loss", "d_loss")
SMOOTHING = 25  # logged steps
POINTS = 150  # of an archived curve


@dataclass(frozen=True)
class Job:
    """A system to train, with its budget."""

    config: TrainConfig
    options: RunOptions

    @property
    def name(self) -> str:
        return f"{self.config.recipe}-seed{self.options.seed}"


def compare(
    jobs: Sequence[Job],
    dataset: Dataset,
    source: dict[str, Any],
    out: Path,
    options: MeasureOptions,
    measurer: Callable[[], Measurer],
    report: Callable[[str], None],
) -> list[str]:
    """Finish every unfinished job. A failure is recorded, and the next job starts.

    Args:
        jobs: in the order of training.
        dataset: for all jobs.
        source: where the data is, for each run's ``data.json``.
        out: the comparison's folder; jobs of earlier calls are kept in it.
        options: what to measure; a run that was measured with other options, or on another split,
            is measured again.
        measurer: makes the measurer for these options; called when it is first needed.
        report: called with each line of progress.

    Returns:
        The names of the jobs that failed, now or before.

    Raises:
        RunError: the folder holds a run or an archived row of the same name with another
            configuration, or a run that was interrupted beyond this budget but within its own; or
            one of its files is damaged.
    """
    ready = functools.cache(measurer)  # its networks are loaded once
    # No paths: an archive should not tell where it was made.
    how = dataclasses.asdict(options)
    if options.resnet20 is not None:
        how["resnet20"] = ResNet20(options.resnet20).digest
    if options.inception is not None:
        how["inception"] = "given"  # a file or "download", of the same weights
    kept = {row["name"]: row for row in _kept_rows(out)}
    archived = set()
    for job in jobs:
        run = out / "runs" / job.name
        _check_same(run, job, dataset, kept.get(job.name))
        if (
            job.name in kept
            and _is_valid(kept[job.name], run)
            and _is_finished(kept[job.name], job, dataset, how)
        ):
            archived.add(job.name)
        else:
            _check_ended(run, job)
    for job in jobs:
        run = out / "runs" / job.name
        if job.name in archived:
            report(f"{job.name}: finished before; its archived row is used")
            continue
        try:
            with locked(run / LOCK):
                _finish(job, run, dataset, source, how, ready, report)
        except Timeout:
            report(f"{job.name}: another process works on it")
        gc.collect()
    names = [job.name for job in jobs if job.name not in archived]
    return [name for name in names if (out / "runs" / name / FAILURE).is_file()]


def _finish(
    job: Job,
    run: Path,
    dataset: Dataset,
    source: dict[str, Any],
    how: dict[str, Any],
    measurer: Callable[[], Measurer],
    report: Callable[[str], None],
) -> None:
    """Train and measure one system; a failure is recorded, so that the next system can start."""
    if _diverged(run):
        report(f"{job.name}: diverged before; delete {run} to try again")
        return
    (run / FAILURE).unlink(missing_ok=True)
    try:
        if not _is_trained(run, job):
            report(f"{job.name}: training")
            train(job.config, dataset, run, job.options, (run / "run.json").is_file(), source)
        folder = latest_checkpoint(run)
        if not _is_measured(run, folder, how, dataset.splits[how["part"]]):
            report(f"{job.name}: measuring")
            model = load_model(folder).to(measurer().device)
            found = measurer().measure(model, read_config(folder))
            write_json(run / MEASURED, {**found, "checkpoint": folder.name, "how": how})
    except RunError:
        raise
    except Exception as error:  # any failure becomes a row of the report
        report(f"{job.name}: {type(error).__name__}: {error}")
        failure = {
            "kind": type(error).__name__,
            "why": str(error),
            "trace": traceback.format_exc(),
        }
        if not (run / "run.json").is_file():  # it failed before it began, and gets a row as well
            open_run(run, job.config, dataset, job.options, source)
        write_json(run / FAILURE, failure)


def _diverged(run: Path) -> bool:
    path = run / FAILURE
    return path.is_file() and read_json(path, "kind")["kind"] == TrainingDiverged.__name__


def _is_valid(kept: dict[str, Any], run: Path) -> bool:
    """Whether an archived row is still valid, even if the run was restarted."""
    return kept["measured"] is not None and not (run / MEASURED).is_file() and not _diverged(run)


def _is_trained(run: Path, job: Job) -> bool:
    folders = checkpoint_folders(run)
    if not folders:
        return False
    return _is_enough(read_state(folders[-1]), job)


def _is_enough(state: dict[str, Any], job: Job) -> bool:
    return _is_spent(state, job.options.images, job.options.minutes, job.config.inference_share)


def _is_spent(state: dict[str, Any], images: int, minutes: float | None, share: float) -> bool:
    """Whether a budget, and a share of it for an inference network, are spent."""
    is_late = minutes is not None and state["seconds"] >= 60 * minutes * (1 + share)
    return is_late or bool(state["images"] >= round(images * (1 + share)))


def _is_finished(row: dict[str, Any], job: Job, dataset: Dataset, how: dict[str, Any]) -> bool:
    """Whether an archived row has the configuration, budget and measurements of a job."""
    return bool(
        row["config"] == job.config
        and row["data"] == dataset.name
        and row["state"] is not None
        and _is_enough(row["state"], job)
        and row["measured"] is not None
        and row["measured"].get("split") == dataset.splits[how["part"]]
        and row["measured"]["how"] == how
    )


def _is_measured(run: Path, folder: Path, how: dict[str, Any], split: str) -> bool:
    """Whether a checkpoint was measured with these options on this part of the data."""
    if not (run / MEASURED).is_file():
        return False
    before = read_json(run / MEASURED, "checkpoint", "how")
    return bool(
        before["checkpoint"] == folder.name
        and before.get("split") == split
        and before["how"] == how
    )


def _check_same(run: Path, job: Job, dataset: Dataset, kept: dict[str, Any] | None) -> None:
    """Check that a run or, where its folder is gone, its archived row can become this job's.

    Raises:
        RunError: it cannot, and would be lost.
    """
    has_folder = (run / "run.json").is_file()
    if has_folder:
        different = different_fields(read_started(run), job.config, dataset.name)
    elif kept is not None and kept["state"] is not None:
        started = {"config": kept["archived"], "data": kept["data"]}
        different = different_fields(started, job.config, dataset.name)
    else:
        return
    if different:
        raise RunError(
            f"{run if has_folder else f'{job.name} in {run.parents[1] / ROWS}'} was trained with "
            f"{'; '.join(different)}: choose another folder for the comparison, or delete "
            f"the {'run' if has_folder else 'row'}"
        )
    if not has_folder:
        return
    folders = checkpoint_folders(run)
    if not folders or _diverged(run):
        return
    state = read_state(folders[-1])
    minutes = job.options.minutes
    if minutes is None or state["seconds"] < 60 * minutes:
        check_budget(run, state["inferring_since"], job.config.batch_size, job.options.images)


def _check_ended(run: Path, job: Job) -> None:
    """Check that a run which has spent a job's budget has also spent its own.

    Its learning rates do not fall before the last part of its own.

    Raises:
        RunError: it was started with a larger budget and was interrupted.
    """
    folders = checkpoint_folders(run)
    if not folders or _diverged(run):  # it is not trained again
        return
    state, options = read_state(folders[-1]), read_started(run)["options"]
    images, minutes = options["images"], options["minutes"]
    # Until a GAN's generator is frozen, the budget counts without that of its inference network.
    is_frozen = state["inferring_since"] is not None
    share = job.config.inference_share if is_frozen else 0.0
    if not _is_spent(state, job.options.images, job.options.minutes, share) or _is_spent(
        state, images, minutes, share
    ):
        return
    time = "" if minutes is None else f" or {minutes:g} minutes"
    raise RunError(
        f"{run} was interrupted after {state['images']:,} images in {state['seconds'] / 60:.1f} "
        f"minutes, and was started with a budget of {images:,} images{time}: finish it with that "
        "budget, delete it, or choose another folder for the comparison"
    )


def read_rows(out: Path) -> list[dict[str, Any]]:
    """Collect each run's configuration, progress, measurements or failure, and curves.

    ``run`` is the run's folder, or ``None`` for an archived row whose folder is gone; such a row
    also has ``archived``, its configuration as it was recorded. An archived row is used until a
    restarted run is measured or diverges. Measurements of an earlier checkpoint are left out.
    """
    rows = []
    kept = {row["name"]: row for row in _kept_rows(out)}
    for path in sorted((out / "runs").glob("*/run.json")):
        run = path.parent
        if run.name in kept and _is_valid(kept[run.name], run):
            continue
        started = read_started(run)
        row: dict[str, Any] = {
            "name": run.name,
            "run": run,
            "config": TrainConfig.from_dict(started["config"]),
            "data": started["data"],
            "source": _source_of(run),
            "seed": started["options"]["seed"],
            "budget": started["options"],
            "state": None,
            "measured": None,
            "failure": None,
        }
        folders = checkpoint_folders(run)
        if folders:
            row["state"] = read_state(folders[-1])
        for key, file in (("measured", MEASURED), ("failure", FAILURE)):
            if (run / file).is_file():
                row[key] = read_json(run / file)
        stale = row["measured"] and folders and row["measured"]["checkpoint"] != folders[-1].name
        if stale or _diverged(run):
            row["measured"] = None
        row["curves"] = {name: _curve(run / "metrics.jsonl", name) for name in CURVES}
        rows.append(row)
    present = {row["name"] for row in rows}
    return rows + [row for name, row in kept.items() if name not in present]


def recorded_data(out: Path) -> dict[Path, str]:
    """What each run was trained on, a name or a folder, as far as that is recorded.

    Runs whose folders are gone are included.
    """
    rows = read_json(out / ROWS, kind=list) if (out / ROWS).is_file() else []
    found = {out / "runs" / row["name"]: row.get("source") for row in rows}
    for path in sorted((out / "runs").glob("*/data.json")):
        found[path.parent] = _source_of(path.parent)
    return {run: source for run, source in found.items() if source is not None}


def _source_of(run: Path) -> str | None:
    path = run / "data.json"
    return str(read_json(path, "data")["data"]) if path.is_file() else None


def keep_rows(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """Archive the rows in ``OUT/rows.json``, one per line, so that a diff shows which changed."""
    kept = [
        {
            **{name: value for name, value in row.items() if name not in ("run", "archived")},
            "config": row.get("archived") or row["config"].to_dict(),
        }
        for row in rows
    ]
    write_text(out / ROWS, "[\n" + ",\n".join(map(json.dumps, kept)) + "\n]\n")


def _kept_rows(out: Path) -> list[dict[str, Any]]:
    if not (out / ROWS).is_file():
        return []
    rows = []
    for row in read_json(out / ROWS, kind=list):
        config = TrainConfig.from_dict(row["config"])
        rows.append({**row, "run": None, "config": config, "archived": row["config"]})
    return rows


def _curve(path: Path, name: str) -> list[list[float]]:
    """Images seen and the running mean of a logged value, at most :data:`POINTS` of each.

    Both lists are empty if the value was not logged.
    """
    found = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            break  # the line was cut off when the run was killed
        if name in row:
            found.append((row["images"], row[name]))
    if len(found) < 2:
        return [[], []]
    images, values = np.array(found, float).T
    width = min(SMOOTHING, len(values))
    sums = np.cumsum(np.insert(values, 0, 0.0))
    means = (sums[width:] - sums[:-width]) / width
    chosen = np.unique(np.linspace(0, len(means) - 1, POINTS).round().astype(int))
    return [images[width - 1 :][chosen].tolist(), means[chosen].round(4).tolist()]
