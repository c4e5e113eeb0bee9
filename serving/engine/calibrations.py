"""Opens the calibrations of a bundle.

These are its own, and the named ones in its folder, which may change while it is served.
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

from serving.engine.bundle import (
    CALIBRATION_NAME,
    FEATURES_NAME,
    Bundle,
    BundleError,
    open_bundle,
)
from serving.verdict.calibration_file import Calibrations
from serving.verdict.semantic import DISTANCE, ENERGY
from serving.verdict.statistics import statistic_names
from serving.verdict.store import CalibrationStore


def open_calibrations(
    bundle: Bundle, folder: Path | None, memory: Path | None = None
) -> CalibrationStore:
    """Open a bundle's calibrations.

    Args:
        bundle: an opened bundle.
        folder: of the named calibrations; ``None`` to use none.
        memory: of :func:`seen_file`, or ``None``; see
            :class:`serving.verdict.store.CalibrationStore`.

    Raises:
        BundleError: the bundle's own file does not match the manifest.
        CalibrationError: the bundle's own file cannot be used.
    """
    own = Calibrations()
    names: list[str] = []
    if "score" in bundle.operations:
        names = statistic_names(bundle.image_shape, bundle.latent_shapes)
        if bundle.has(FEATURES_NAME):
            has_classes = (bundle.manifest.get("features") or {}).get("classes")
            names += [DISTANCE, ENERGY] if has_classes else [DISTANCE]
    if bundle.has(CALIBRATION_NAME):
        own = Calibrations.load(bundle.file(CALIBRATION_NAME))
        own.check(names)
        # Files of older versions leave the coder's version to the manifest.
        about = bundle.manifest.get("calibration") or {}
        own = dataclasses.replace(own, webp=own.webp or about.get("webp", ""))

    def is_there() -> bool:
        try:
            there = open_bundle((folder or Path()).parent)
            if not bundle.has(CALIBRATION_NAME):
                there = there.uncalibrated()
            return there.digest == bundle.digest
        except (BundleError, OSError):
            return False

    return CalibrationStore(own, folder, bundle.networks, names, is_there, memory)


def seen_file(bundle: Bundle, memory: Path) -> Path:
    """The file that exists once a service has seen ``default.npz`` of a bundle.

    Its name depends on the bundle's digest and on the folder that the service was given. So another
    bundle in the same folder has another file, and a link that is moved to a copy of the bundle
    keeps its file.

    Args:
        bundle: as the service was given it.
        memory: a folder of the service, which need not exist.
    """
    key = f"{bundle.digest} {bundle.folder.absolute()}".encode(errors="surrogateescape")
    return memory / f"{hashlib.sha256(key).hexdigest()}.default"
