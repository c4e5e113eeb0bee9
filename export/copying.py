"""Copies a bundle that is to be changed."""

from __future__ import annotations

import shutil
from pathlib import Path

from serving.engine.bundle import MANIFEST_NAME, Bundle, BundleError, open_bundle, verify_bundle


def copy_bundle(bundle: Bundle, target: Path) -> None:
    """Copy the files that a bundle's manifest lists.

    Whoever changes the copy writes a manifest with the hashes of all its files. So the copy holds
    no other files, and is checked before that. The copy has the permissions of new files, since the
    bundle may be write-protected.

    Args:
        bundle: as its manifest was read.
        target: an empty folder.

    Raises:
        BundleError: the bundle is not whole, or was replaced meanwhile.
    """
    shutil.copyfile(bundle.folder / MANIFEST_NAME, target / MANIFEST_NAME)
    if open_bundle(target).manifest != bundle.manifest:
        raise BundleError(f"{bundle.folder} was replaced while it was copied")
    for name in bundle.manifest["files"]:
        if not (bundle.folder / name).is_file():
            raise BundleError(f"{bundle.folder / name} is missing")
        shutil.copyfile(bundle.folder / name, target / name)
    verify_bundle(target)
