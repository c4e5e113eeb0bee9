"""Copies a bundle that is to be changed."""

from __future__ import annotations

import shutil
from pathlib import Path

from serving.engine.bundle import MANIFEST_NAME, Bundle, BundleError, open_bundle, verify_bundle
from serving.verdict.store import FOLDER


def copy_bundle(bundle: Bundle, target: Path) -> None:
    """Copy the files that a bundle's manifest lists, and its named calibrations.

    Whoever changes the copy writes a manifest with the hashes of all its files. So the copy holds
    no other files, and is checked before that. Hidden files are locks and calibrations that are
    being written.

    Args:
        bundle: as its manifest was read.
        target: an empty folder.

    Raises:
        BundleError: the bundle is not whole, was replaced meanwhile, or a file cannot be copied.
    """
    shutil.copy(bundle.folder / MANIFEST_NAME, target)
    if open_bundle(target).manifest != bundle.manifest:
        raise BundleError(f"{bundle.folder} was replaced while it was copied")
    for name in bundle.manifest["files"]:
        if not (bundle.folder / name).is_file():
            raise BundleError(f"{bundle.folder / name} is missing")
        shutil.copy(bundle.folder / name, target)
    if (bundle.folder / FOLDER).is_dir():
        try:
            shutil.copytree(
                bundle.folder / FOLDER, target / FOLDER, ignore=shutil.ignore_patterns(".*")
            )
        except shutil.Error as error:
            source, _, reason = error.args[0][0]
            raise BundleError(f"{source} cannot be copied: {reason}") from error
    verify_bundle(target)
