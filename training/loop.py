"""The training loop: steps over batches, with logging, evaluation and checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from ade_model.checkpoint import read_config
from serving.files import replacing, write_text
from serving.signals import signals_held
from training.data import Dataset
from training.device import DEVICES, bfloat16_is_faster, choose_device
from training.evaluate import bits_of, reconstruction_grid, sample_grid, sample_kinds
from training.guide import NAME as GUIDE_NAME
from training.guide import Guide, load_guide
from training.recipes import TrainConfig
from training.report import write_report
from training.runs import (
    Progress,
    RunError,
    check_growth_from,
    checkpoint_folders,
    latest_checkpoint,
    load_checkpoint,
    read_json,
    save_checkpoint,
    start_from,
    write_json,
)
from training.step import Trainer

logger = logging.getLogger(__name__)
PRECISIONS = ("auto", "float32", "bfloat16")
LOG_EVERY = 10
SELECT_IMAGES = 500


@dataclass(frozen=True)
class RunOptions:
    """Budget, device and logging cadence of a run.

    Attributes:
        images: training images to see, over all processes.
        minutes: training time after which the run ends too; ``None`` for no limit.
        seed: of weights, order and noise.
        device: one of :data:`training.device.DEVICES`.
        precision: of the networks, one of :data:`PRECISIONS`; log-densities are always float32.
        checkpoint_minutes: minutes between checkpoints.
        checkpoint_steps: steps after which a checkpoint is written earlier.
        evaluate_steps: steps between evaluations of held-out images and samples.
        init: run or bundle to take initial weights from.
        guide: what :func:`training.guide.load_guide` reads, if the configuration has a
            ``guide_weight``; a run keeps a copy, with which it is resumed.
    """

    images: int
    minutes: float | None = None
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"
    checkpoint_minutes: float = 5.0
    checkpoint_steps: int = 1000
    evaluate_steps: int = 500
    init: str | None = None
    guide: str | None = None

    def __post_init__(self) -> None:
        for name in ("images", "checkpoint_steps", "evaluate_steps"):
            if getattr(self, name) < 1:
                raise RunError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("minutes", "checkpoint_minutes"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise RunError(f"{name} must be above 0 and finite, got {value:g}")
        for name, known in (("device", DEVICES), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                raise RunError(
                    f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}"
                )
        if not 0 <= self.seed < 2**63:
            raise RunError(f"seed must be from 0 to 2^63 - 1, got {self.seed}")


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
        options: budget, device and cadence.
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
    options = _with_its_own(run, options, resume)
    fabric = make_fabric(options.device, options.precision)
    is_main = fabric.global_rank == 0
    trainer, progress, lineage = _prepare(config, dataset, run, options, resume, fabric)
    with _with_others(fabric):
        fabric.barrier()
    if is_main:  # all checks have passed: write to the folder from here on
        open_run(run, config, dataset, options, source)
    about = {
        "recipe": config.recipe,
        "started_from": lineage,
        "data": dataset.name,
        "splits": dataset.splits,
        "seed": options.seed,
        "training": config.to_dict(),
    }
    if trainer.guide is not None:
        about["guided"] = True
    progress = _run_steps(dataset, run, options, fabric, trainer, progress, about)
    if is_main:
        folder = save_checkpoint(run, trainer, progress, about)
        write_report(run, folder, dataset, trainer.ema, fabric.device)
    with _with_others(fabric):
        fabric.barrier()
    return progress


def _prepare(
    config: TrainConfig,
    dataset: Dataset,
    run: Path,
    options: RunOptions,
    resume: bool,
    fabric: Fabric,
) -> tuple[Trainer, Progress, dict[str, Any] | None]:
    """Check everything, and make a trainer with the weights that the run begins or resumes with.

    Returns:
        The trainer, the progress of a resumed run, and what its weights were started from.
    """
    _check_shares(config, fabric.world_size)
    _check_run(run, config, dataset, resume)
    guide = _guide_of(config, options)

    def average(flat: torch.Tensor) -> torch.Tensor:
        if fabric.world_size == 1:
            return flat
        with _with_others(fabric):
            mean = fabric.all_reduce(flat, reduce_op="mean")
        assert isinstance(mean, torch.Tensor)
        return mean

    trainer = Trainer(
        config,
        fabric.device,
        fabric.autocast,
        average,
        options.seed,
        fabric.global_rank,
        fabric.world_size,
        guide,
    )
    progress = Progress()
    lineage: dict[str, Any] | None = None
    if resume and checkpoint_folders(run):
        progress = load_checkpoint(checkpoint_folders(run)[-1], trainer)
        lineage = read_config(checkpoint_folders(run)[-1])["started_from"]
    elif options.init is not None:
        start_from(Path(options.init), trainer)
        lineage = _lineage(Path(options.init))
    if not _out_of_time(progress, options.minutes):
        check_budget(run, trainer.inferring_since, config.batch_size, options.images)
    return trainer, progress, lineage


def _with_its_own(run: Path, options: RunOptions, resume: bool) -> RunOptions:
    """Options with what shaped the weights of a resumed run already: seed, init and guide."""
    if not (resume and (run / "run.json").is_file()):
        return options
    before = read_started(run)["options"]
    options = dataclasses.replace(options, seed=before["seed"], init=before["init"])
    # A run without a guide may have such a file as well, if an encoder was written there.
    if before.get("guide") is not None and (run / GUIDE_NAME).is_file():
        options = dataclasses.replace(options, guide=str(run / GUIDE_NAME))
    return options


def _guide_of(config: TrainConfig, options: RunOptions) -> Guide | None:
    if options.guide is None:
        if config.guide_weight:
            raise RunError(f"guide_weight must be 0 without a guide, got {config.guide_weight:g}")
        return None
    if not config.guide_weight:
        raise RunError("guide_weight must be above 0 with a guide, got 0")
    return load_guide(Path(options.guide), config.model.image_size, config.model.channels)


def _check_shares(config: TrainConfig, processes: int) -> None:
    if config.batch_size % processes:
        raise RunError(
            f"batch_size must be a multiple of {processes}, the number of processes, "
            f"got {config.batch_size}"
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
            configuration, the processes that ``torchrun`` started cannot share a batch, or the
            weights to start from or the guide do not suit the configuration.
        FeatureError: the guide cannot be read.
    """
    check_folder(run, resume)
    _check_shares(config, int(os.environ.get("WORLD_SIZE", "1")))
    if resume:
        _check_unchanged(run, config, read_started(run)["data"])
    check_weights(config, run, options, resume)


def check_weights(config: TrainConfig, run: Path, options: RunOptions, resume: bool) -> None:
    """Check the guide and the weights to start from, if there are any.

    The arguments are those of :func:`check_start`.

    Raises:
        RunError: they do not suit the configuration.
        FeatureError: the guide cannot be read.
    """
    options = _with_its_own(run, options, resume)
    _guide_of(config, options)
    if options.init is not None and not (resume and checkpoint_folders(run)):
        check_growth_from(Path(options.init), config.model)


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
    log = _Log(run, progress.step) if is_main else None
    batches_a_step = 1 + (config.d_steps if config.discriminator else 0)
    batches = dataset.parts["train"].batches(
        config.batch_size, options.seed, progress.step * batches_a_step
    )
    share = config.batch_size // fabric.world_size
    mine = slice(fabric.global_rank * share, (fabric.global_rank + 1) * share)

    is_intact = True  # whether the trainer is between two steps
    recent: dict[str, float] = {}
    started = time.monotonic() - progress.seconds
    last_saved = time.monotonic()
    # Training the inference network of a GAN comes on top of the budget.
    whole = 1 + config.inference_share
    total = round(options.images * whole)
    minutes = options.minutes and options.minutes * whole
    bar = tqdm(
        total=total if minutes is None else None,
        initial=progress.images,
        unit="img",
        unit_scale=True,
        disable=not is_main,
        mininterval=1.0,
        dynamic_ncols=True,
    )
    try:
        while progress.images < total and not _out_of_time(progress, minutes):
            spent = _spent(progress, options)
            drawn = [
                torch.from_numpy(np.ascontiguousarray(next(batches)[mine]))
                for _ in range(batches_a_step)
            ]
            with signals_held():
                is_intact = False
                if config.inference_share and spent >= 1:
                    trainer.begin_inference()
                    spent = (spent - 1) / config.inference_share
                losses = trainer.run(drawn, spent)
                seconds = time.monotonic() - started
                # All processes must use the same rate and stop at the same step.
                if fabric.world_size > 1 and minutes is not None:
                    with _with_others(fabric):
                        seconds = float(fabric.broadcast(seconds))
                progress = Progress(trainer.step, progress.images + config.batch_size, seconds)
                is_intact = True
            if log is None:
                continue
            bar.update(config.batch_size)
            recent |= losses  # not all losses are computed at every step
            if progress.step % LOG_EVERY == 0 or progress.step == 1:
                bar.set_postfix(
                    {
                        k: f"{losses[k]:.3f}"
                        for k in ("bpd", "quality_loss", "d_loss")
                        if k in losses
                    }
                )
                if minutes is not None:
                    bar.set_description(f"{max(0.0, minutes - progress.seconds / 60):.1f} min left")
                log.scalars(progress, recent)
                recent = {}
            if progress.step % options.evaluate_steps == 0:
                log.evaluate(trainer, dataset, progress)
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


def _lineage(init: Path) -> dict[str, Any]:
    """Recipe and images seen of the run that weights are taken from, and of its own ancestors."""
    source = read_config(latest_checkpoint(init))
    found = {key: source.get(key) for key in ("recipe", "images_seen", "started_from")}
    return found | {key: source[key] for key in ("flow_from", "guided") if key in source}


def _out_of_time(progress: Progress, minutes: float | None) -> bool:
    return minutes is not None and progress.seconds >= 60 * minutes


def _spent(progress: Progress, options: RunOptions) -> float:
    """The larger of the fractions of the budgets of images and of time that are spent.

    It is above 1 while the inference network of a GAN is trained.
    """
    of_time = progress.seconds / (60 * options.minutes) if options.minutes else 0.0
    return max(progress.images / options.images, of_time)


def check_folder(run: Path, resume: bool) -> None:
    """Check that a run can start in a folder, or resume there.

    Raises:
        RunError: the folder holds a run already, or holds none to resume.
    """
    holds_run = (run / "run.json").is_file()
    if holds_run and not resume:
        raise RunError(f"{run} already holds a run: resume it, or choose another folder")
    if resume and not holds_run:
        raise RunError(f"{run} holds no run to resume")


def budget_of(run: Path) -> tuple[int | None, float | None]:
    """The images and minutes that a run was last started with; ``None`` for what it lacks.

    Raises:
        RunError: ``run.json`` is damaged.
    """
    path = run / "run.json"
    options = read_json(path, "options")["options"] if path.is_file() else {}
    return options.get("images"), options.get("minutes")


def _check_run(run: Path, config: TrainConfig, dataset: Dataset, resume: bool) -> None:
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
    different = different_fields(read_started(run), config, data)
    if different:
        raise RunError(
            f"{run} cannot be resumed: it was started with another {', '.join(different)}"
        )


def open_run(
    run: Path,
    config: TrainConfig,
    dataset: Dataset,
    options: RunOptions,
    source: dict[str, Any] | None,
) -> None:
    """Write ``run.json``, with which a run begins, and ``data.json`` if a source is given."""
    run.mkdir(parents=True, exist_ok=True)
    if options.guide is not None and Path(options.guide) != run / GUIDE_NAME:
        with replacing(run / GUIDE_NAME) as file:
            file.write(Path(options.guide).read_bytes())
    if source is not None:
        write_json(run / "data.json", source)
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


def different_fields(started: dict[str, Any], config: TrainConfig, data: str) -> list[str]:
    """Names of the fields in which a run's ``run.json`` differs from a configuration.

    Args:
        started: the ``run.json``.
        config: the configuration.
        data: name of the data set.
    """
    before = {**TrainConfig.from_dict(started["config"]).to_dict(), "data set": started["data"]}
    wanted = {**config.to_dict(), "data set": data}
    return sorted(
        key for key in before.keys() | wanted.keys() if before.get(key) != wanted.get(key)
    )


class _Log:
    """Logs losses as JSON lines and to TensorBoard, and pictures to TensorBoard."""

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
        row: dict[str, Any] = {**dataclasses.asdict(progress), **values}
        self._file.write(json.dumps(row) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, progress.step)
        self._board.add_scalar(
            "images_per_second", progress.images / max(progress.seconds, 1e-9), progress.step
        )

    def evaluate(self, trainer: Trainer, dataset: Dataset, progress: Progress) -> None:
        images = dataset.parts["select"].images[:SELECT_IMAGES]
        if len(images) and "score" in trainer.operations:
            bpd = bits_of(trainer.ema, images, trainer.device, samples=1)
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
        self._file.close()
        self._board.close()
