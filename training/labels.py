"""Classes of images, from a data set or from the folders that they lie in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from ade_base.messages import printable
from training.data import Dataset

IMAGES_A_CLASS = 20
SPLITS = {"train", "val", "valid", "validation", "test"}
LISTED = 10  # names of classes


def class_folders(names: Sequence[str]) -> list[str] | None:
    """Names of the folders of a data set, in order, if each is a class.

    Folders above them may hold everything, such as ``images``, or be called ``train``, ``val``,
    ``valid``, ``validation`` and ``test``.

    Args:
        names: of the images to train on, relative to the data set, with ``/``.

    Returns:
        ``None`` if there are fewer than two folders, if an image lies outside them, or if folders
        have fewer than 20 images on average.
    """
    depth = _class_depth(names)
    folders = sorted({_folder(name, depth) for name in names})
    if "" in folders or len(folders) < 2 or len(names) < IMAGES_A_CLASS * len(folders):
        return None
    return folders


def why_no_classes(names: Sequence[str]) -> str | None:
    """Why images that lie in folders have no classes; ``None`` if they have, or lie in one folder.

    Args:
        names: as for :func:`class_folders`.
    """
    depth = _class_depth(names)
    counts = Counter(_folder(name, depth) for name in names)
    outside = counts.pop("", 0)
    if len(counts) < 2:
        return None
    if outside:
        name = next(name for name in names if not _folder(name, depth))
        return f"{printable(name)} lies outside the {len(counts)} folders"
    if len(names) < IMAGES_A_CLASS * len(counts):
        return (
            f"the {len(counts)} folders have {len(names) / len(counts):.0f} training images on "
            f"average, and {IMAGES_A_CLASS} are needed"
        )
    return None


def _class_depth(names: Sequence[str]) -> int:
    """The number of folders above the class folders."""
    depth = 0
    while True:
        folders = {_folder(name, depth) for name in names}
        are_splits = {folder.lower() for folder in folders} <= SPLITS
        if not folders or "" in folders or not (len(folders) == 1 or are_splits):
            return depth
        depth += 1


def _folder(name: str, depth: int) -> str:
    """The folder of a path at a depth, from 0; empty if the path has fewer."""
    folders = name.split("/")[:-1]
    return folders[depth] if depth < len(folders) else ""


def listed(folders: Sequence[str]) -> str:
    """The first names of class folders, for the user."""
    more = len(folders) - LISTED
    return ", ".join(folders[:LISTED]) + (f" and {more} more" if more > 0 else "")


def class_labels(dataset: Dataset, part: str = "train") -> np.ndarray | None:
    """Classes of the images of a part: the data set's, or of a folder its :func:`class_folders`.

    Returns:
        int ``(N,)``, -1 for a class that the part ``train`` does not have; ``None`` if there are no
        classes.
    """
    if dataset.parts["train"].labels is not None:
        return dataset.parts[part].labels
    names = dataset.files.get("train", [])
    folders = class_folders(names)
    if folders is None:
        return None
    number = {folder: i for i, folder in enumerate(folders)}
    depth = _class_depth(names)
    return np.array([number.get(_folder(name, depth), -1) for name in dataset.files[part]])
