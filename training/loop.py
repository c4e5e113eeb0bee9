"""The training loop: steps over batches, with logging, evaluation and checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from tqdm import tqdm

from ade_base.system import signals_held
from ade_model.checkpoint import read_config
from training.config import TrainConfig
from training.data import Dataset
from training.datasets.sketch import KEY, VERSION, record_of, sketch_in, version_of
from training.device import bfloat16_is_faster, choose_device
from training.report import write_report
from training.run_log import RunLog
from training.run_options import RunOptions
from training.run_start import (
    check_budget,
    check_run,
    check_shares,
    open_run,
    resumed_options,
)
from training.runs import (
    WARM_NAME,
    Progress,
    RunError,
    checkpoint_folders,
    load_checkpoint,
    load_warm_start,
    save_checkpoint,
    save_warm_start,
)
from training.schedule import images_in, schedule_of
from training.step import Trainer

logger = logging.getLogger(__name__)
LOG_EVERY = 10
# Of each phase, to learn how many images a budget in minutes allows.
MEASURED_SECONDS, MEASURED_SHARE = 20.0, 0.01


def make_fabric(device: str, precision: str) -> Fabric:
    """Lightning Fabric for one process, or for those that ``torchrun`` started; TF32 is off.

    They may run on several machines.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``.
        precision: ``auto``, ``float32`` or ``bfloat16``.

    Raises:
        RunError: ``cuda`` is requested and PyTorch finds no GPU.
    """
    accelerator = choose_device(device).type
    if precision == "auto":
        precision = "bfloat16" if bfloat16_is_faster(accelerator) else "float32"
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    nodes = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    fabric = Fabric(
        accelerator=accelerator,
        devices=processes,
        strategy="ddp" if processes * nodes > 1 else "auto",
        num_nodes=nodes,
        precision="bf16-mixed" if precision == "bfloat16" else "32-true",
    )
    fabric.launch()
    return fabric


@contextlib.contextmanager
def _with_others(fabric: Fabric) -> Iterator[None]:
    """For what all processes do together.

    Raises:
        RunError: another process has ended, or cannot be reached.
    """
    try:
        yield
    except RuntimeError as error:  # the backends have no error of their own in common
        if fabric.world_size == 1:
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RunError(
            f"process {fabric.global_rank} of {fabric.world_size} has lost the others: one ended, "
            "perhaps with its machine, or the network failed. The checkpoints are complete: resume "
            "the run with as many processes as there are now (with a projected discriminator, with "
            f"as many as before) ({reason})"
        ) from error


def train(
    config: TrainConfig,
    dataset: Dataset,
    run: Path,
    options: RunOptions,
    resume: bool,
    source: dict[str, Any] | None = None,
) -> Progress:
    """Train until the budget is spent, and write the report.

    Args:
        config: what to train and how.
        dataset: the ``train`` part is trained on, the ``select`` part is evaluated.
        run: the run's folder: a new one or, with ``resume``, one of the same configuration.
        options: budget, device and cadence. Minutes become images at the start, by the speed then.
        resume: whether to resume from the newest checkpoint. The cooldown is that of the present
            budget: with a larger one than before, the rates return to their full values until the
            last part of that budget.
        source: where the data is, written to ``RUN/data.json`` for later measurements.

    Returns:
        The progress at the end.

    Raises:
        RunError: the folder does not suit ``resume``, or the run cannot be resumed this way; the
            folder is left unchanged. Or another process of the run ended.
        TrainingDiverged: losses were not finite; the last good checkpoint is kept.
    """
    options = resumed_options(run, options, resume)
    fabric = make_fabric(options.device, options.precision)
    if options.minutes is not None and not resume:
        options = _in_images(config, dataset, options, fabric)
    is_main = fabric.global_rank == 0
    trainer, progress, before = _prepare(config, dataset, run, options, resume, fabric)
    # Now, because files may be moved or deleted while the run lasts. By all processes, because it
    # may take longer than the others would wait for one.
    sketch = _sketch_of(dataset, before)
    _check_alike(fabric, dataset, sketch, trainer)
    if is_main:  # all checks have passed: write to the folder from here on
        open_run(run, config, dataset, options, source)
    about = {
        "recipe": config.recipe,
        "data": dataset.name,
        "splits": dataset.splits,
        "seed": options.seed,
        "training": config.to_dict(),
    }
    if sketch:
        about |= {KEY: sketch, VERSION: version_of(dataset)}
    progress = _run_steps(dataset, run, options, fabric, trainer, progress, about)
    if is_main:
        folder = save_checkpoint(run, trainer, progress, about)
        write_report(run, folder, dataset, trainer.ema, fabric.device)
    with _with_others(fabric):
        fabric.barrier()
    return progress


def _check_alike(
    fabric: Fabric, dataset: Dataset, sketch: list[str] | None, trainer: Trainer
) -> None:
    """Check that all processes begin with the same images and weights, and wait for them.

    Each reads its own files, and gradients alone are averaged: replicas that differ would never
    become alike, and only one of them is saved.

    Raises:
        RunError: a process has others than the first one.
    """
    if fabric.world_size == 1:
        return
    # Not their pixels, which another version of a decoder may give other values. In a resumed run a
    # node whose files have other times reads them again, but equal files give an equal sketch.
    names = dataset.files.get("train", dataset.splits["train"])
    images = [names, len(dataset.parts["train"]), sketch]
    values = [*trainer.model.state_dict().values()]
    for adversary in trainer.adversaries:  # not their buffers: processors may round them otherwise
        values += adversary.network.parameters()
    weights = [value.detach().cpu().numpy().tobytes() for value in values]
    digests = [hashlib.sha256(its) for its in (json.dumps(images).encode(), b"".join(weights))]
    with _with_others(fabric):
        every = fabric.all_gather(torch.tensor([list(its.digest()) for its in digests]))
    assert isinstance(every, torch.Tensor)
    for row, what in enumerate(("training images", "initial weights")):
        others = [rank for rank in range(len(every)) if (every[rank, row] != every[0, row]).any()]
        if others:
            raise RunError(
                f"process {others[0]} of {len(every)} has other {what} than process 0: each node "
                "needs the same files at the same path"
            )


def _trainer(config: TrainConfig, options: RunOptions, fabric: Fabric) -> Trainer:
    """A trainer with new weights."""

    def average(flat: torch.Tensor) -> torch.Tensor:
        if fabric.world_size == 1:
            return flat
        with _with_others(fabric):
            mean = fabric.all_reduce(flat, reduce_op="mean")
        assert isinstance(mean, torch.Tensor)
        return mean

    return Trainer(
        config=config,
        device=fabric.device,
        autocast=fabric.autocast,
        average=average,
        seed=options.seed,
        rank=fabric.global_rank,
        processes=fabric.world_size,
    )


def _in_images(
    config: TrainConfig, dataset: Dataset, options: RunOptions, fabric: Fabric
) -> RunOptions:
    """Options whose minutes have become training images, by the speed of a few steps.

    From then on a run depends on its steps alone, so that one that is killed and resumed ends with
    the same weights. The steps are those of a trainer that is thrown away.
    """
    assert options.minutes is not None
    trainer, seconds = _trainer(config, options, fabric), []
    for is_joint in (False, True):
        if is_joint:
            trainer.begin_joint()
        elif trainer.joint_since is not None:
            continue
        batches = _batches(dataset, trainer, options.seed, Progress(step=trainer.step))
        trainer.run(next(batches))  # which also warms up
        started, steps = time.monotonic(), 0
        limit = min(MEASURED_SECONDS, MEASURED_SHARE * 60 * options.minutes)
        while not steps or time.monotonic() - started < limit:
            trainer.run(next(batches))
            steps += 1
            if fabric.world_size > 1:  # all must make equally many
                break
        images = steps * trainer.batch_sizes[-1]
        seconds.append((time.monotonic() - started) / images)
    if fabric.world_size > 1:
        with _with_others(fabric):
            seconds = fabric.broadcast(seconds)
    images = images_in(config, 60 * options.minutes, seconds[0], seconds[-1])
    return dataclasses.replace(options, images=min(options.images, images))


def _prepare(
    config: TrainConfig,
    dataset: Dataset,
    run: Path,
    options: RunOptions,
    resume: bool,
    fabric: Fabric,
) -> tuple[Trainer, Progress, dict[str, Any]]:
    """Check everything, and make a trainer with the weights that the run begins or resumes with.

    Returns:
        The trainer, and of a resumed run its progress and the ``config.json`` of its checkpoint.
    """
    check_shares(config, fabric.world_size)
    check_run(run, config, dataset, resume)
    trainer = _trainer(config, options, fabric)
    progress = Progress()
    before: dict[str, Any] = {}
    if resume and checkpoint_folders(run):
        progress = load_checkpoint(checkpoint_folders(run)[-1], trainer)
        before = read_config(checkpoint_folders(run)[-1])
    elif resume and (run / WARM_NAME).is_file():
        progress = load_warm_start(run, trainer)
        logger.warning(
            "%s has no checkpoint: it resumes from %s, of step %d, with new optimisers",
            run,
            WARM_NAME,
            progress.step,
        )
    check_budget(run, trainer.inferring_since, config.batch_size, options.images)
    return trainer, progress, before


def _run_steps(
    dataset: Dataset,
    run: Path,
    options: RunOptions,
    fabric: Fabric,
    trainer: Trainer,
    progress: Progress,
    about: dict[str, Any],
) -> Progress:
    """Train until the budget is spent, with logs and checkpoints; returns the progress then.

    An interruption (Ctrl-C, or a SIGTERM that raises) is raised after a checkpoint.
    """
    config = trainer.config
    is_main = fabric.global_rank == 0
    log = RunLog(run, progress.step) if is_main else None
    is_intact = True  # whether the trainer is between two steps
    recent: dict[str, float] = {}
    started = time.monotonic() - progress.seconds
    last_saved = time.monotonic()
    schedule = schedule_of(config, options.images, trainer.joint_since)
    batches: dict[bool, Iterator[list[torch.Tensor]]] = {}  # by whether the adversary takes part
    bar = tqdm(
        total=schedule.total + schedule.inference,
        initial=progress.step,
        unit="step",
        disable=not is_main,
        mininterval=1.0,
        dynamic_ncols=True,
    )
    try:
        while not schedule.is_done(trainer.step, trainer.inferring_since):
            if trainer.joint_since is None and trainer.step >= schedule.likelihood:
                if is_main:  # to fall back on
                    save_checkpoint(run, trainer, progress, about)
                trainer.begin_joint()
            if schedule.inference and trainer.step >= schedule.total:
                trainer.begin_inference()
            is_joint = trainer.joint_since is not None
            if is_joint not in batches:
                batches[is_joint] = _batches(dataset, trainer, options.seed, progress)
            drawn = next(batches[is_joint])
            with signals_held():
                is_intact = False
                losses = trainer.run(drawn, schedule.spent(trainer.step, trainer.inferring_since))
                progress = Progress(
                    step=trainer.step,
                    images=progress.images + len(drawn[-1]) * fabric.world_size,
                    seconds=time.monotonic() - started,
                )
                is_intact = True
            if log is None:
                continue
            bar.update()
            recent |= losses  # not all losses are computed at every step
            if progress.step % LOG_EVERY == 0 or progress.step == 1:
                bar.set_postfix(
                    {
                        k: f"{losses[k]:.3f}"
                        for k in ("bpd", "quality_loss", "d_loss")
                        if k in losses
                    }
                )
                log.scalars(progress, recent)
                recent = {}
            if progress.step % options.evaluate_steps == 0:
                log.evaluate(trainer, dataset, progress)
                if not trainer.inferring:
                    save_warm_start(run, trainer, progress)
            if (
                progress.step % options.checkpoint_steps == 0
                or time.monotonic() - last_saved > 60 * options.checkpoint_minutes
            ):
                save_checkpoint(run, trainer, progress, about)
                last_saved = time.monotonic()
    except (KeyboardInterrupt, SystemExit):
        if is_main and is_intact and progress.step:
            save_checkpoint(run, trainer, progress, about)
        raise
    finally:
        bar.close()
        if log is not None:
            log.close()
    return progress


def _batches(
    dataset: Dataset, trainer: Trainer, seed: int, progress: Progress
) -> Iterator[list[torch.Tensor]]:
    """This process's share of each step's batches, from a step of the present phase on.

    Which images a step sees depends on the configuration and the step alone.
    """
    config = trainer.config
    sizes = trainer.batch_sizes
    before = (trainer.joint_since or 0) if trainer.joint_since is not None else progress.step
    first = before * config.first_batch_size + (progress.step - before) * sum(sizes)
    images = dataset.parts["train"].batches(sum(sizes), seed, first)
    ends = np.cumsum(sizes)
    while True:
        of_step = next(images)
        yield [
            torch.from_numpy(np.array_split(batch, trainer.processes)[trainer.rank].copy())
            for batch in np.split(of_step, ends[:-1])
        ]


def _sketch_of(dataset: Dataset, before: dict[str, Any]) -> list[str] | None:
    """The sketch of all files that a run is trained on; ``None`` if they are not known.

    Args:
        dataset: that the run is trained on from now on.
        before: the ``config.json`` of the checkpoint that it resumes with. If that describes the
            same files, its sketch is used, because reading all would delay each resumption.
    """
    earlier = sketch_in(before)
    if earlier and before.get(VERSION) == version_of(dataset):
        return earlier
    return record_of(dataset, earlier or ()).get(KEY)
