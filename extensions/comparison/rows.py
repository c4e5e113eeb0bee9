"""The rows of a comparison: what is known of each run, from its folder or from the archive."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ade_base.files import write_text
from training.config import TrainConfig
from training.run_start import read_started
from training.runs import RunError, checkpoint_folders, read_json, read_state
from training.step import TrainingDiverged

MEASURED, FAILURE, ROWS = "measured.json", "failure.json", "rows.json"
CURVES = ("bpd", "quality_loss", "d_loss")
SMOOTHING = 25  # logged steps
POINTS = 150  # of an archived curve
RESNET20, EFFICIENTNET, INCEPTION = "resnet20-cifar10", "efficientnet-lite0", "inception-v3"
SPACES = {RESNET20: "Fréchet ResNet-20", EFFICIENTNET: "Fréchet EfficientNet", INCEPTION: "FID 50k"}


@dataclass(frozen=True)
class Distance:
    """Of mean samples from real images in a feature space.

    Attributes:
        frechet: the distance.
        samples: their number.
        reference: the real images, in words.
        is_reliable: whether there are more images than features.
        is_independent: whether the model was not trained against these features.
        precision: share of samples near a real image; ``None`` if not measured.
        recall: share of real images near a sample; ``None`` if not measured.
    """

    frechet: float
    samples: int
    reference: str
    is_reliable: bool = True
    is_independent: bool = True
    precision: float | None = None
    recall: float | None = None


@dataclass(frozen=True)
class Bound:
    """The importance-weighted bound, and the ELBO of the same images if it was measured."""

    bpd: float
    draws: int
    images: int
    elbo: float | None = None


@dataclass(frozen=True)
class Measured:
    """What was measured of a checkpoint; figures are ``None`` if they were not.

    Attributes:
        checkpoint: name of its folder.
        how: the options, as :meth:`extensions.comparison.measure.MeasureOptions.archived`.
        split: the held-out images.
        images: their number.
        bpd: by the ELBO.
        bpd_error: its standard error.
        bound: the importance-weighted bound.
        psnr: mean of the reconstructions that are not exact, dB; ``None`` if all are.
        gan_train: accuracy of a classifier that learnt from samples.
        gan_train_of_real: that of one that learnt from as many training images.
        density: the Fréchet distance of density samples in the features of ResNet-20.
        distances: of mean samples, by feature space.
    """

    checkpoint: str
    how: dict[str, Any]
    split: str
    images: int
    bpd: float | None = None
    bpd_error: float | None = None
    bound: Bound | None = None
    psnr: float | None = None
    gan_train: float | None = None
    gan_train_of_real: float | None = None
    density: float | None = None
    distances: dict[str, Distance] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: dict[str, Any], path: Path) -> Measured:
        """Rebuild from JSON.

        Raises:
            RunError: the file is damaged, or of another version.
        """
        try:
            bound, distances = values.get("bound"), values.get("distances", {})
            values = {**values, "bound": None if bound is None else Bound(**bound)}
            values["distances"] = {space: Distance(**its) for space, its in distances.items()}
            return cls(**values)
        except (TypeError, AttributeError) as error:
            raise RunError(f"{path} is damaged, or of another version ({error})") from error


@dataclass(frozen=True)
class Row:
    """One run.

    Attributes:
        name: of its folder.
        run: the folder; ``None`` for an archived row.
        config: what was trained.
        data: name of the data set.
        source: where the data is; ``None`` if that was not recorded.
        seed: of the run.
        images_budget: training images, without those of a GAN's inference network.
        minutes_budget: which became that number of images when the run started.
        step: model steps made.
        images: training images seen.
        seconds: of training.
        inferring_since: step after which a GAN's inference network is trained.
        rescues: how often training returned to the averaged weights.
        failure: why the run failed; ``None`` if it did not.
        measured: of its newest checkpoint; ``None`` if it was not measured or diverged.
        curves: for each of :data:`CURVES`, images seen and smoothed values.
    """

    name: str
    run: Path | None
    config: TrainConfig
    data: str
    source: str | None
    seed: int
    images_budget: int
    minutes_budget: float | None = None
    step: int = 0
    images: int = 0
    seconds: float = 0.0
    inferring_since: int | None = None
    rescues: int = 0
    failure: str | None = None
    measured: Measured | None = None
    curves: dict[str, list[list[float]]] = field(
        default_factory=lambda: {name: [[], []] for name in CURVES}
    )

    @property
    def system(self) -> str:
        """Name of the recipe."""
        return self.config.recipe

    @property
    def label(self) -> str:
        """The system, with the seed unless it is 0."""
        return f"{self.system} (seed {self.seed})" if self.seed else self.system

    @property
    def for_inference(self) -> int:
        """Number of images that the inference network of a frozen generator was trained on."""
        if self.inferring_since is None:
            return 0
        return (self.step - self.inferring_since) * self.config.batch_size

    @property
    def learned(self) -> int:
        """Number of images that the system was trained on, without those."""
        return self.images - self.for_inference

    @property
    def is_ended(self) -> bool:
        """Whether its budget is spent; learning rates do not fall before the last part of it."""
        return self.has_seen(self.images_budget)

    def has_seen(self, budget: int) -> bool:
        """Whether a number of images, or with the inference network its share too, were seen."""
        share = self.config.inference_share if self.inferring_since is not None else 0.0
        return self.images >= round(budget * (1 + share))

    def distance(self, space: str) -> Distance | None:
        """Of mean samples in a feature space, if it was measured."""
        return None if self.measured is None else self.measured.distances.get(space)


def used_spaces(rows: Sequence[Row]) -> list[str]:
    """The feature spaces in which a distance was measured."""
    return [space for space in SPACES if any(row.distance(space) for row in rows)]


def number_text(value: float | None, digits: int = 2) -> str:
    """A number as it is printed, a dash for none."""
    if value is None:
        return "–"
    return f"{value:.{digits}f}" if abs(value) < 1e4 else f"{value:.1e}"


def read_rows(out: Path) -> list[Row]:
    """One row for each run, and for each archived one whose folder is gone.

    An archived row is used until a restarted run is measured or diverges.
    """
    rows = []
    kept = {row.name: row for row in kept_rows(out)}
    for path in sorted((out / "runs").glob("*/run.json")):
        run = path.parent
        if run.name not in kept or is_newer(run, kept[run.name]):
            kept.pop(run.name, None)
            rows.append(run_row(run))
    return [*rows, *kept.values()]


def is_newer(run: Path, kept: Row) -> bool:
    """Whether a run has replaced its archived row."""
    return kept.measured is None or (run / MEASURED).is_file() or diverged(run)


def run_row(run: Path) -> Row:
    """The row of a run's folder. Measurements of an earlier checkpoint are left out."""
    started = read_started(run)
    row = Row(
        run.name,
        run,
        TrainConfig.from_dict(started["config"]),
        started["data"],
        source_of(run),
        started["options"]["seed"],
        started["options"]["images"],
        started["options"]["minutes"],
        failure=read_json(run / FAILURE, "why")["why"] if (run / FAILURE).is_file() else None,
        curves={name: _curve(run / "metrics.jsonl", name) for name in CURVES},
    )
    folders = checkpoint_folders(run)
    measured = None
    if (run / MEASURED).is_file() and not diverged(run):
        measured = Measured.from_dict(read_json(run / MEASURED), run / MEASURED)
    if not folders:
        return dataclasses.replace(row, measured=measured)
    state = read_state(folders[-1])
    return dataclasses.replace(
        row,
        **{name: state[name] for name in ("step", "images", "seconds", "inferring_since")},
        rescues=len(state["rescued_at"]),
        measured=measured if measured and measured.checkpoint == folders[-1].name else None,
    )


def diverged(run: Path) -> bool:
    """Whether training failed in a way in which it would fail again."""
    path = run / FAILURE
    return path.is_file() and read_json(path, "kind")["kind"] == TrainingDiverged.__name__


def source_of(run: Path) -> str | None:
    """What a run was trained on, a name or a folder, if that is recorded."""
    path = run / "data.json"
    return str(read_json(path, "data")["data"]) if path.is_file() else None


def recorded_data(out: Path) -> dict[Path, str]:
    """What each run was trained on, as far as that is recorded, also if its folder is gone."""
    found = {out / "runs" / row.name: row.source for row in kept_rows(out)}
    found |= {path.parent: source_of(path.parent) for path in (out / "runs").glob("*/data.json")}
    return {run: source for run, source in sorted(found.items()) if source is not None}


def keep_rows(rows: Sequence[Row], out: Path) -> None:
    """Archive the rows in ``OUT/rows.json``, one per line, so that a diff shows which changed."""
    kept = [{**dataclasses.asdict(row), "run": None} for row in rows]
    write_text(out / ROWS, "[\n" + ",\n".join(map(json.dumps, kept)) + "\n]\n")


def kept_rows(out: Path) -> list[Row]:
    """The archived rows.

    Raises:
        RunError: the archive is damaged, or of another version.
    """
    path = out / ROWS
    rows = []
    for values in read_json(path, kind=list) if path.is_file() else ():
        try:
            measured = values["measured"]
            values["config"] = TrainConfig.from_dict(values["config"])
            values["measured"] = None if measured is None else Measured.from_dict(measured, path)
            rows.append(Row(**values))
        except (TypeError, KeyError) as error:
            raise RunError(f"{path} is damaged, or of another version ({error})") from error
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
    means = np.convolve(values, np.full(width, 1 / width), "valid")
    chosen = np.unique(np.linspace(0, len(means) - 1, POINTS).round().astype(int))
    return [images[width - 1 :][chosen].tolist(), means[chosen].round(4).tolist()]
