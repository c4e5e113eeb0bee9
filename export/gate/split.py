"""Which images of a folder or data set fit a gate's density, calibrate the gate and test it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from export.gate.density_fit import MIN_IMAGES
from export.sketch import data_of_features, data_of_model
from serving.engine.bundle import Bundle
from serving.ingest.picture import Picture
from training.data import PARTS, DataError, Dataset, Report
from training.datasets.files import is_split_by_name, part_of, shuffled
from training.datasets.folder import image_files
from training.datasets.sketch import file_hashes, sketch_in

MAX_IMAGES = 20_000
FIT_SHARE = 0.4  # as in CIFAR-10's held-out parts; the other images calibrate
MAX_FITTED = round(FIT_SHARE * MAX_IMAGES)
MAX_CALIBRATING = MAX_IMAGES - MAX_FITTED
ENOUGH_FILES = 500  # of a folder that trained a network: a twenty-fifth of them fit the density


class CalibrationSplit(NamedTuple):
    """Items to fit to, to calibrate on, unseen ones, and those that a network was trained on."""

    fit: list[Any]
    calibrate: list[Any]
    unseen: list[Any]
    trained: list[Any]


def choose_files(
    folder: Path, bundle: Bundle, features: Mapping[str, Any] | None, report: Report
) -> CalibrationSplit:
    """Choose files of a folder, at most :data:`MAX_IMAGES` to fit to and to calibrate on.

    Args:
        folder: of images.
        bundle: that is calibrated.
        features: see :func:`trained_on`.
        report: called with a line that says what is left out.

    Raises:
        DataError: the folder holds no images, or a network was trained on it and too few files are
            held out, or on files that were renamed since, see :func:`trained_on`.
    """
    files = image_files(folder)
    trained = trained_on(bundle, folder.resolve().name, None, features, report, files)
    parts: dict[str, list[Path]] = {part: [] for part in PARTS}
    for path in files:
        parts[_part_in(folder, path, bool(trained))].append(path)
    if trained:
        few = len(parts["select"]), len(parts["calibrate"])
        used = f"{sum(few)} of {len(files)} files"
        if min(few) < MIN_IMAGES:
            raise DataError(
                f"the {trained}, so only {used} can be used: {few[0]} to fit the density of "
                f"statistics and {few[1]} to set the false-alarm rate. Each needs at least "
                f"{MIN_IMAGES}: give other images, or a folder of about {ENOUGH_FILES} files or "
                "more"
            )
        report(
            f"the {trained}: only its parts select and calibrate are used, {used}, and no copies "
            "of training images"
        )
    elif parts["test"]:
        report(f"left out for ade ood-bench: {len(parts['test'])} of {len(files)} files")
    chosen = _choose({part: shuffled(paths) for part, paths in parts.items()}, bool(trained))
    return chosen._replace(
        unseen=chosen.unseen[:MAX_IMAGES], trained=parts["train"] if trained else []
    )


def choose_rows(
    dataset: Dataset, bundle: Bundle, features: Mapping[str, Any] | None, report: Report
) -> list[Iterator[np.ndarray | Picture]]:
    """Choose images of a data set, at most :data:`MAX_IMAGES` to fit to and to calibrate on.

    No training images are given: published data sets have hardly any copies.

    Args:
        dataset: with the images.
        bundle: that is calibrated.
        features: see :func:`trained_on`.
        report: called with a line if a network was trained on the data set.
    """
    trained = trained_on(bundle, dataset.name, dataset.splits, features, report)
    if trained:
        report(f"the {trained}: only its parts select and calibrate are used")
    parts = {part: [(part, row) for row in range(len(dataset.parts[part]))] for part in PARTS}
    return [
        (as_read(dataset, part, row) for part, row in rows)
        for rows in _choose(parts, bool(trained))
    ]


def as_read(dataset: Dataset, part: str, row: int) -> np.ndarray | Picture:
    """An image of a data set, marked if it was resized when the data set was read."""
    pixels = np.asarray(dataset.parts[part].images[[row]])[0]
    return Picture(pixels, [], resized=True) if dataset.is_resized else pixels


def files_that_test(
    folder: Path, bundle: Bundle, calibrated_on: str | None, report: Report
) -> tuple[Callable[[Path], bool], list[Path]] | None:
    """Which files of a folder test a gate, and which trained a network; ``None`` if all test it.

    If a network of the bundle was trained on the folder, or the gate calibrated on it, only the
    part ``test`` does, without the copies of training images that it may hold.

    Args:
        folder: of images.
        bundle: that is tested.
        calibrated_on: name of the data that the gate was calibrated on.
        report: called with a line if not all files do.

    Raises:
        DataError: the folder holds no images, or a network was trained on files of it that were
            renamed since, see :func:`trained_on`.
    """
    name, files = folder.resolve().name, image_files(folder)
    trained = trained_on(bundle, name, None, data_of_features(bundle), report, files)
    if not trained and name != calibrated_on:
        return None
    copies = ", and no copies of training images" if trained else ""
    report(f"the {trained or f'gate was calibrated on {name}'}: only its part test is used{copies}")

    def part(file: Path) -> str:
        return _part_in(folder, file, bool(trained))

    return lambda file: part(file) == "test", [f for f in files if trained and part(f) == "train"]


def trained_on(
    bundle: Bundle,
    name: str,
    splits: dict[str, str] | None,
    features: Mapping[str, Any] | None,
    report: Report,
    files: Sequence[Path] = (),
) -> str:
    """Whether a network was trained on a data set, whose held-out parts must be used then.

    A folder is recognised by its files, whatever its name is, if the bundle has a sketch of the
    training files (:mod:`training.datasets.sketch`), and by its name otherwise.

    Args:
        bundle: its manifest describes the data sets of the model and of those it was started from.
        name: of the data set, or of a folder.
        splits: of a named data set; ``None`` for a folder. Its training part decides, since the
            other parts may be divided otherwise. Splits by file names are equal even if their
            numbers of files differ, since an added file moves no other.
        features: describes the data set of the network of features; ``None`` if unknown.
        report: called with a warning of another data set of the same name.
        files: of a folder.

    Returns:
        Which network and how it is known, such as ``model was trained on photos (recognised by its
        name)``; an empty string for none.

    Raises:
        DataError: the names of training files put them into held-out parts: they were renamed. Or
            a network was trained on other images of the same official part, so that held-out parts
            may hold some of these.
    """
    found = []
    by_hash: dict[str, list[Path]] = defaultdict(list)
    of_model = [("model", data) for data in data_of_model(bundle)]
    for network, data in (*of_model, ("network of features", features)):
        sketch = sketch_in(data) if data and files else None
        if sketch:
            if not by_hash:
                report(f"comparing {len(files)} files with those that networks were trained on")
                for path, file_hash in file_hashes(files):
                    by_hash[file_hash].append(path)
            copies = [by_hash[file_hash] for file_hash in sketch if file_hash in by_hash]
            if copies:
                _check_names(network, copies)
                found.append(
                    f"{network} was trained on files of {name} (recognised by the content of "
                    f"{len(copies)} files, such as {copies[0][0]})"
                )
                continue
        if not data or data.get("name") != name:
            continue
        if sketch:
            why = f"but none of {len(sketch)} of its files is among these"
        elif _has_training_part(data.get("splits", {}), splits):
            how = "" if splits else " (recognised by its name)"
            found.append(f"{network} was trained on {name}{how}")
            continue
        else:
            _check_apart(network, name, data.get("splits", {}), splits or {})
            why = "with another split"
        report(
            f"warning: the {network} of {bundle.name} was trained on a data set of the same name, "
            f"{name}, {why}: check that these images were not trained on"
        )
    return found[0] if found else ""


def _has_training_part(its: Mapping[str, str], splits: dict[str, str] | None) -> bool:
    """Whether the splits that trained a network have the training part of a data set's.

    The arguments are those of :func:`trained_on`, ``its`` the recorded ones.
    """
    if is_split_by_name(dict(its)):
        return splits is None or is_split_by_name(splits)
    return splits is not None and its.get("train") == splits.get("train")


def _check_apart(
    network: str, name: str, its: Mapping[str, str], splits: Mapping[str, str]
) -> None:
    """Check that different training parts are not slices of one official part.

    Raises:
        DataError: they are, such as ``train[0:45000]`` and ``train[0:40000]``.
    """
    then, now = its.get("train", ""), splits.get("train", "")
    if now and then.partition("[")[0] == now.partition("[")[0]:
        raise DataError(
            f"the {network} was trained on {then} of {name}, and the training part is {now} now: "
            f"which images it has not seen is unknown. Give the files of {name} that it was "
            "trained on, or other images"
        )


def _check_names(network: str, copies: Sequence[Sequence[Path]]) -> None:
    """Check that training files have names of the part ``train``, since parts follow from names.

    Args:
        network: that was trained on them.
        copies: the files of each content; one name of the part ``train`` suffices.

    Raises:
        DataError: some have not.
    """
    wrong = [paths[0] for paths in copies if all(part_of(p.name) != "train" for p in paths)]
    if wrong:
        raise DataError(
            f"the {network} was trained on {wrong[0]}"
            + (f" and at least {len(wrong) - 1} other files" if len(wrong) > 1 else "")
            + " under another name. Names tell which files it has not seen, and these files were "
            f"renamed or copied since: give images that the {network} was not trained on"
        )


def _part_in(folder: Path, path: Path, by_name: bool) -> str:
    """The part of a file of a folder.

    If a network was trained on the folder, it follows from the file's name, as in training.
    Otherwise it follows from the path inside the folder, because parts of files of one name would
    lack what only the others show.
    """
    return part_of(path.name if by_name else path.relative_to(folder).as_posix())


def _choose(parts: dict[str, list[Any]], held_out: bool) -> CalibrationSplit:
    """Choose from the items of each part.

    If a network was trained on the data (``held_out``), only images that it has not seen must be
    used: the parts ``select`` and ``calibrate``. Otherwise all but the part ``test`` are divided.
    ``ade ood-bench`` measures false alarms on the part ``test``, so it is not used in either case.
    """
    if held_out:
        fit, calibrate = (
            shuffled(parts[part])[:most] if len(parts[part]) > most else parts[part]
            for part, most in (("select", MAX_FITTED), ("calibrate", MAX_CALIBRATING))
        )
        return CalibrationSplit(fit, calibrate, parts["test"], [])
    rest = shuffled([item for part in PARTS if part != "test" for item in parts[part]])[:MAX_IMAGES]
    first = round(FIT_SHARE * len(rest))
    return CalibrationSplit(rest[:first], rest[first:], parts["test"], [])
