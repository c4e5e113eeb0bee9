"""The folder of a training run, and its checkpoints.

``RUN/run.json`` holds the run's configuration, ``RUN/data.json`` where its images are,
``RUN/checkpoints/step-N/`` everything else
that is needed to resume, ``RUN/metrics.jsonl`` and ``RUN/tensorboard/`` the losses,
``RUN/curve.jsonl`` what they do to held-out images, ``RUN/warm-start.safetensors`` what a lost
checkpoint can be replaced with, and
``RUN/report.md`` and ``RUN/pictures/`` the report at the end.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ade_base.errors import UserError
from ade_base.files import alone_in as only_one_in
from ade_base.files import new_folder, replacing, sha256_of, write_text
from ade_model.checkpoint import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    read_tensors,
    save_model,
)
from training.adversary import Adversary
from training.step import Trainer

KEEP = 3
EMA_NAME = WEIGHTS_NAME  # the averaged weights are the model; the raw ones serve to resume
RAW_NAME = "raw.safetensors"
STATE_NAME = "state.json"
MANIFEST_NAME = "manifest.json"  # only bundles have one
WARM_NAME = "warm-start.safetensors"


class RunError(UserError, ValueError):
    """The folder of a run cannot be used as requested, or an option is invalid."""


@dataclass(frozen=True)
class Progress:
    """Model steps, training images seen and seconds of training."""

    step: int = 0
    images: int = 0
    seconds: float = 0.0


# Fields of state.json.
PROGRESS = tuple(field.name for field in fields(Progress))
TRAINER_STATE = (
    "skipped_in_a_row",
    "skipped",
    "usual_norm",
    "joint_since",
    "inferring_since",
    "rescued_at",
)
STATE = (*PROGRESS, "processes", *TRAINER_STATE)


def write_json(path: Path, values: Any) -> None:
    """Write a JSON file, whole or not at all."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def read_json(path: Path, *fields: str, kind: type[dict[str, Any]] | type[list[Any]] = dict) -> Any:
    """Read a JSON file that :func:`write_json` wrote.

    Args:
        path: the file.
        fields: that an object must have.
        kind: ``dict`` or ``list``.

    Raises:
        RunError: it is damaged.
    """
    try:
        values = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} is damaged: {error}") from error
    if not isinstance(values, kind):
        raise RunError(f"{path} is damaged: it holds a {type(values).__name__}")
    missing = [name for name in fields if name not in values]
    if missing:
        raise RunError(f"{path} is damaged: it lacks {', '.join(missing)}")
    return values


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other programs out of a folder; the processes that ``torchrun`` started count as one.

    Raises:
        RunError: another process works in the folder.
    """
    if int(os.environ.get("RANK", "0")):
        yield
        return
    with only_one_in(folder, RunError):
        yield


def folder_name(step: int) -> str:
    """Name of the checkpoint after a number of steps."""
    return f"step-{step:09d}"


def checkpoint_folders(run: Path) -> list[Path]:
    """Finished checkpoints, oldest first. Copies under other names do not count."""
    found = [
        (int(number), path)
        for path in (run / "checkpoints").glob("step-*")
        if (number := path.name.removeprefix("step-")).isdecimal() and (path / STATE_NAME).is_file()
    ]
    return [path for _, path in sorted(found)]


def latest_checkpoint(run: Path) -> Path:
    """The newest checkpoint of a run; the folder of a checkpoint or bundle is returned as it is.

    Raises:
        RunError: the folder does not exist, holds no finished checkpoint, or is a bundle whose
            model is missing or does not match the manifest.
    """
    if (run / WEIGHTS_NAME).is_file():
        if (run / MANIFEST_NAME).is_file():
            _check_bundle(run)
        return run
    if not run.exists():
        raise RunError(f"there is no run, checkpoint or bundle {run}")
    if (run / MANIFEST_NAME).is_file():
        raise RunError(f"{run / WEIGHTS_NAME} is missing: the bundle is incomplete")
    folders = checkpoint_folders(run)
    if not folders:
        raise RunError(f"{run} holds no finished checkpoint")
    return folders[-1]


def _check_bundle(folder: Path) -> None:
    """Check the model of a bundle of any format version, whose figures belong to it alone."""
    listed = read_json(folder / MANIFEST_NAME, "files")["files"]
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        expected = listed.get(name) if isinstance(listed, dict) else None
        found = sha256_of(folder / name)
        if found != expected:
            raise RunError(
                f"{folder / name} does not match the manifest: expected SHA-256 {expected}, got "
                f"{found}"
            )


def run_of(checkpoint: Path) -> Path:
    """The run of a checkpoint; another folder, such as a bundle's, is returned as it is."""
    parent = checkpoint.absolute().parent
    return parent.parent if parent.name == "checkpoints" else checkpoint


def save_checkpoint(run: Path, trainer: Trainer, progress: Progress, about: dict[str, Any]) -> Path:
    """Write a checkpoint, whole or not at all, and delete older ones.

    The newest three are kept, and that at the end of a phase of likelihood alone. A checkpoint of
    the same step is kept as it is, since it holds the same weights.

    Args:
        run: the run's folder.
        trainer: with the weights.
        progress: of the run so far.
        about: further fields for ``config.json``, beside the images seen and the operations.

    Returns:
        The checkpoint's folder.
    """
    parent = run / "checkpoints"
    target = parent / folder_name(progress.step)
    if (target / STATE_NAME).is_file():
        return target
    # A process that was killed leaves unfinished folders; no other process writes here now.
    for unfinished in (target, *parent.glob(".step-*.tmp")):
        shutil.rmtree(unfinished, ignore_errors=True)
    with new_folder(target, RunError) as folder:
        found = {"images_seen": progress.images, "operations": list(trainer.operations)}
        save_model(trainer.ema, folder, {**about, **found})
        _save(trainer.model.state_dict(), folder / RAW_NAME)
        _save_optimizer(trainer.optimizer, folder / "optimizer.safetensors")
        # Before they take part they are new, and a function of the seed alone.
        for adversary in trainer.adversaries if trainer.is_joint else ():
            weights, optimizer = (folder / name for name in _files_of(adversary))
            _save(adversary.network.state_dict(), weights)
            _save_optimizer(adversary.optimizer, optimizer)
        write_json(
            folder / STATE_NAME,
            {
                **asdict(progress),
                "processes": trainer.processes,
                **{name: getattr(trainer, name) for name in TRAINER_STATE},
            },
        )
        for path in folder.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    for old in checkpoint_folders(run)[:-KEEP]:
        if not trainer.joint_since or old.name != folder_name(trainer.joint_since):
            shutil.rmtree(old)
    return target


def load_checkpoint(folder: Path, trainer: Trainer) -> Progress:
    """Load a checkpoint into a trainer that was built from the same configuration.

    Raises:
        RunError: the checkpoint's discriminator compares the images of a process and had another
            number of them, or ``state.json`` is damaged.
        ConfigError: a file of tensors is damaged or missing.
    """
    state = read_state(folder)
    processes = state["processes"]
    if trainer.config.compares_images and processes != trainer.processes:
        raise RunError(
            f"{folder} cannot be resumed by {trainer.processes} processes: its discriminator "
            f"compares the images of each process, so the run needs {processes} as before"
        )
    trainer.ema.load_state_dict(read_tensors(folder / EMA_NAME))
    trainer.model.load_state_dict(read_tensors(folder / RAW_NAME))
    _load_optimizer(trainer.optimizer, folder / "optimizer.safetensors")
    progress = Progress(**{name: state[name] for name in PROGRESS})
    trainer.step = progress.step
    for name in TRAINER_STATE:
        setattr(trainer, name, state[name])
    for adversary in trainer.adversaries if trainer.is_joint else ():
        weights, optimizer = (folder / name for name in _files_of(adversary))
        adversary.network.load_state_dict(read_tensors(weights))
        _load_optimizer(adversary.optimizer, optimizer)
    if trainer.inferring:
        trainer.begin_inference()
    return progress


def save_warm_start(run: Path, trainer: Trainer, progress: Progress) -> None:
    """Write the averaged weights and the discriminators, in half precision, to one small file.

    It can be kept where a checkpoint, five times as large, cannot. What it lacks, a run finds again
    within some hundred steps: the raw weights and the state of the optimisers.
    """
    state = {**asdict(progress), "joint_since": trainer.joint_since}
    tensors = {
        name: value.detach().to("cpu", torch.float16 if value.is_floating_point() else value.dtype)
        for name, value in _warm(trainer).items()
    }
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    with replacing(run / WARM_NAME) as file:
        file.write(safetensors.torch.save(tensors, {"state": json.dumps(state)}))


def load_warm_start(run: Path, trainer: Trainer) -> Progress:
    """Begin with the file of :func:`save_warm_start`, for a trainer of the same configuration.

    Raises:
        RunError: the file is not one of this configuration.
        ConfigError: it is damaged.
    """
    path = run / WARM_NAME
    tensors = read_tensors(path)
    with safetensors.safe_open(path, "pt") as file:
        state = json.loads((file.metadata() or {}).get("state", "{}"))
    if state.keys() != {*PROGRESS, "joint_since"}:
        raise RunError(f"{path} is damaged: it does not say at which step it was written")
    trainer.step, trainer.joint_since = state["step"], state["joint_since"]
    expected = _warm(trainer)
    if {n: v.shape for n, v in expected.items()} != {n: v.shape for n, v in tensors.items()}:
        raise RunError(f"{path} does not fit the run: it is of another configuration")
    with torch.no_grad():
        for name, value in expected.items():
            value.copy_(tensors[name])
    trainer.model.load_state_dict(trainer.ema.state_dict())
    return Progress(**{name: state[name] for name in PROGRESS})


def _warm(trainer: Trainer) -> dict[str, Tensor]:
    """The tensors of a warm start by name: those that training changes."""
    tensors = {f"model.{name}": value for name, value in trainer.ema.state_dict().items()}
    for adversary in trainer.adversaries if trainer.is_joint else ():
        tensors |= {f"{adversary.name}.{n}": p for n, p in adversary.network.named_parameters()}
    return tensors


def read_state(folder: Path) -> dict[str, Any]:
    """The progress of a checkpoint, and what else its tensors do not hold.

    Raises:
        RunError: the file is damaged.
    """
    state: dict[str, Any] = read_json(folder / STATE_NAME, *STATE)
    return state


def _files_of(adversary: Adversary) -> tuple[str, str]:
    """The names of the files of a discriminator's weights and of its optimiser's state."""
    return f"{adversary.name}.safetensors", f"{adversary.prefix}d_optimizer.safetensors"


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    # save_file raises another error than OSError where the disk is full.
    path.write_bytes(
        safetensors.torch.save({k: v.detach().cpu().contiguous() for k, v in tensors.items()})
    )


def _save_optimizer(optimizer: torch.optim.Optimizer, path: Path) -> None:
    state = optimizer.state_dict()["state"]
    _save(
        {
            f"{index}.{key}": value
            for index, values in state.items()
            for key, value in values.items()
        },
        path,
    )


def _load_optimizer(optimizer: torch.optim.Optimizer, path: Path) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in read_tensors(path).items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )
    # In the layout of their weights, as before: sums in another order are rounded otherwise.
    for parameter, of_it in optimizer.state.items():
        for key, value in of_it.items():
            if value.shape == parameter.shape:
                of_it[key] = torch.empty_like(parameter).copy_(value)
