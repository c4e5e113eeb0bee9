"""Copies a bundle that is to be changed."""

from __future__ import annotations

import shutil
from pathlib import Path

from ade_base.files import NO_ROOM
from serving.engine.bundle import MANIFEST_NAME, Bundle, BundleError, open_bundle, verify_bundle
from serving.verdict.store import FOLDER


def copy_bundle(bundle: Bundle, target: Path) -> None:
    """Copy the files that a bundle's manifest lists, and its named calibrations.

    Whoever changes the copy writes a manifest with the hashes of all its files. So the copy holds
    no other files, and is checked before that. Hidden files are locks and calibrations that are
    being written; folders are no calibrations. The copy has the permissions of new files, since the
    bundle may be write-protected.

    Args:
        bundle: as its manifest was read.
        target: an empty folder.

    Raises:
        BundleError: the bundle is not whole, was replaced meanwhile, or a file cannot be copied.
    """
    shutil.copyfile(bundle.folder / MANIFEST_NAME, target / MANIFEST_NAME)
    if open_bundle(target).manifest != bundle.manifest:
        raise BundleError(f"{bundle.folder} was replaced while it was copied")
    for name in bundle.manifest["files"]:
        if not (bundle.folder / name).is_file():
            raise BundleError(f"{bundle.folder / name} is missing")
        shutil.copyfile(bundle.folder / name, target / name)
    if (bundle.folder / FOLDER).is_dir():
        (target / FOLDER).mkdir()
        for path in sorted(bundle.folder.glob(f"{FOLDER}/[!.]*")):
            if path.is_dir():
                continue
            try:
                shutil.copyfile(path, target / FOLDER / path.name)
            except OSError as error:
                if error.errno in NO_ROOM:
                    raise
                reason = error.strerror or error
                raise BundleError(f"{path} cannot be copied: {reason}") from error
    verify_bundle(target)
