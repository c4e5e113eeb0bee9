"""Checks before a run starts or resumes, and ``run.json``, with which it starts."""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path
from typing import Any

import torch

from training.config import TrainConfig
from training.data import Dataset
from training.run_options import RunOptions
from training.runs import (
    RunError,
    checkpoint_folders,
    folder_name,
    read_json,
    read_state,
    write_json,
)
from training.schedule import schedule_of

logger = logging.getLogger(__name__)
DATA_NAME = "data.json"
# How fields of adversaries begin. A run may resume with others until they take part: two copies of
# it compare two adversaries.
OF_ADVERSARIES = ("recipe ", "d_", "pixel_d_", "gp_", "quality_weight ", "alone_steps ", "augment ")
# What a run writes after run.json, with which it begins.
WRITTEN = ("metrics.jsonl", "curve.jsonl", "report.md", "checkpoints", "pictures")


def resumed_options(run: Path, options: RunOptions, resume: bool) -> RunOptions:
    """Options with the seed that a resumed run was started with.

    Args:
        run: the run's folder.
        options: as given now.
        resume: whether the run is resumed; otherwise the options stay as they are.

    Raises:
        RunError: ``run.json`` is damaged.
    """
    if not (resume and (run / "run.json").is_file()):
        return options
    before = read_started(run)["options"]
    options = dataclasses.replace(options, seed=before["seed"])
    if options.minutes is not None:
        if options.minutes != before["minutes"]:
            raise RunError(
                f"minutes became {before['images']:,} images when {run} was started: they must be "
                f"those of the run, {before['minutes']}, or left out, got {options.minutes:g}"
            )
        options = dataclasses.replace(options, images=before["images"])
    return options


def check_shares(config: TrainConfig, processes: int) -> None:
    """Check that processes can share a batch.

    Raises:
        RunError: they cannot.
    """
    for name in ("batch_size", "coverage_batch_size", "likelihood_batch_size"):
        if getattr(config, name) % processes:
            raise RunError(
                f"{name} must be a multiple of {processes}, the number of processes, "
                f"got {getattr(config, name)}"
            )


def _check_nodes() -> None:
    """Check that ``torchrun`` started equally many processes on each node, as Lightning assumes.

    Raises:
        RunError: it did not.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "LOCAL_WORLD_SIZE" not in os.environ:
        raise RunError("several processes must be started by torchrun, which sets LOCAL_WORLD_SIZE")
    names = ("LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "WORLD_SIZE")
    here, nodes, total = (int(os.environ.get(name, "1")) for name in names)
    if here * nodes != total:
        raise RunError(
            f"every node needs the same number of processes, got {here} on this one and {total} "
            f"in total on {nodes} nodes"
        )


def check_start(config: TrainConfig, run: Path, options: RunOptions, resume: bool) -> None:
    """Check what :func:`train` needs beside the images, which may take long to read.

    Args:
        config: as for :func:`train`.
        run: as for :func:`train`.
        options: as for :func:`train`.
        resume: as for :func:`train`.

    Raises:
        RunError: the folder does not suit ``resume``, the run was started with another
            configuration, or the processes that ``torchrun`` started cannot share a batch or are
            not equally many on each node.
    """
    check_folder(run, resume)
    _check_nodes()
    check_shares(config, int(os.environ.get("WORLD_SIZE", "1")))
    if resume:
        _check_unchanged(run, config, read_started(run)["data"])
    resumed_options(run, options, resume)  # refuses other minutes


def check_budget(run: Path, inferring_since: int | None, batch_size: int, images: int) -> None:
    """Check that a run can still see a number of images.

    Args:
        run: the run's folder.
        inferring_since: step since which a GAN's generator is frozen and its inference network is
            trained; ``None`` before.
        batch_size: images per step.
        images: the budget.

    Raises:
        RunError: the generator was frozen after fewer images.
    """
    if inferring_since is not None and inferring_since * batch_size < images:
        raise RunError(
            f"{run} trains its inference network, since its generator was finished after "
            f"{inferring_since * batch_size:,} images: its budget cannot be raised"
        )


def check_folder(run: Path, resume: bool) -> None:
    """Check that a run can start in a folder, or resume there.

    Args:
        run: the folder, which need not exist.
        resume: whether the run is resumed.

    Raises:
        RunError: the folder holds a run already, or holds none to resume, or holds something else
            that a new run would replace.
    """
    holds_run = (run / "run.json").is_file()
    if holds_run and not resume:
        raise RunError(f"{run} already holds a run: resume it, or choose another folder")
    if resume and not holds_run:
        raise RunError(f"{run} holds no run to resume")
    if resume:
        return
    found = [name for name in WRITTEN if os.path.lexists(run / name)]
    # A start that failed, as on a full disk, may have left these.
    if os.path.lexists(run / DATA_NAME) and not _is_source(run / DATA_NAME):
        found.append(DATA_NAME)
    if found:
        raise RunError(
            f"{run} holds {', '.join(found)}, but no run that can be resumed: choose another folder"
        )


def _is_source(path: Path) -> bool:
    """Whether a file is the ``data.json`` of a run."""
    try:
        read_json(path, "data")
    except (RunError, OSError):
        return False
    return True


def last_options(run: Path) -> dict[str, Any]:
    """The options that a run was last started with, by name; empty if it was not started.

    Raises:
        RunError: ``run.json`` is damaged.
    """
    path = run / "run.json"
    options: dict[str, Any] = read_json(path, "options")["options"] if path.is_file() else {}
    return options


def check_run(run: Path, config: TrainConfig, dataset: Dataset, resume: bool) -> None:
    """Check the run's folder again once the images are read; warns if these have changed.

    Raises:
        RunError: as :func:`check_folder`, or the run was started with another configuration.
    """
    check_folder(run, resume)
    if not resume:
        return
    _check_unchanged(run, config, dataset.name)
    before = read_started(run)
    # The first part suffices: it is that of the training images if these have changed.
    for part, now in dataset.splits.items():
        if (then := before["splits"].get(part)) != now:
            logger.warning(
                "%s was started on %s and resumes with %s (part %s)", run, then, now, part
            )
            break


def _check_unchanged(run: Path, config: TrainConfig, data: str) -> None:
    started = read_started(run)
    before = TrainConfig.from_dict(started["config"])
    different = different_fields(before, started["data"], config, data)
    folders = checkpoint_folders(run)
    if folders and read_state(folders[-1])["joint_since"] is None:
        different = [its for its in different if not its.startswith(OF_ADVERSARIES)]
    if different:
        raise RunError(f"{run} cannot be resumed: it was started with {'; '.join(different)}")


def open_run(
    run: Path,
    config: TrainConfig,
    dataset: Dataset,
    options: RunOptions,
    source: dict[str, Any] | None,
) -> None:
    """Write ``run.json``, with which a run begins, and ``data.json`` if a source is given."""
    run.mkdir(parents=True, exist_ok=True)
    if source is not None:
        write_json(run / DATA_NAME, source)
    write_json(
        run / "run.json",
        {
            "config": config.to_dict(),
            "data": dataset.name,
            "splits": dataset.splits,
            "skipped_files": dataset.skipped,
            "options": dataclasses.asdict(options),
            "torch": torch.__version__,
        },
    )


def read_started(run: Path) -> dict[str, Any]:
    """The ``run.json`` of a run: what it was started with.

    Raises:
        RunError: the file is damaged.
    """
    started: dict[str, Any] = read_json(run / "run.json", "config", "data", "splits", "options")
    return started


def last_of_likelihood(run: Path) -> Path | None:
    """The checkpoint at the end of a run's phase of likelihood alone, if it got there."""
    started = read_started(run)
    config = TrainConfig.from_dict(started["config"])
    step = schedule_of(config, started["options"]["images"]).likelihood
    folder = run / "checkpoints" / folder_name(step)
    return folder if step and folder in checkpoint_folders(run) else None


def different_fields(
    before: TrainConfig, data_before: str, config: TrainConfig, data: str
) -> list[str]:
    """In what two runs differ, such as ``flow_width 32, now 48``.

    Args:
        before: configuration of the first.
        data_before: name of its data set.
        config: configuration of the second.
        data: name of its data set.
    """
    had, wanted = _fields(before, data_before), _fields(config, data)
    return [
        f"{name} {had.get(name)}, now {wanted.get(name)}"
        for name in had | wanted
        if had.get(name) != wanted.get(name)
    ]


def _fields(config: TrainConfig, data: str) -> dict[str, Any]:
    """The fields of a configuration and of its networks, as changes to a recipe name them."""
    values = {"data set": data, **config.to_dict()}
    networks = values.pop("model")
    for kind, prefix in (("discriminator", "d_"), ("pixel_discriminator", "pixel_d_")):
        networks |= {f"{prefix}{k}": value for k, value in (values.pop(kind) or {}).items()}
    return {**values, **networks}
