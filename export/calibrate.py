"""Calibration of a bundle: held-out images through the serving engine, what they give into a new bundle."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from export.detector import fit_calibration
from serving.bundle import CALIBRATION_NAME, Bundle, verify_bundle, write_manifest
from serving.engine import InferenceEngine
from serving.errors import ApiError, unusable
from serving.files import new_folder
from serving.images import coder_version
from serving.ood import Calibration, CalibrationError
from serving.requests import InputImage, prepare_image

CHUNK = 256
MAX_SKIPPED_SHOWN = 5

Report = Callable[[str], None]


def calibrate_bundle(folder: Path, out: Path, fit: Iterable[bytes | np.ndarray], calibrate: Iterable[bytes | np.ndarray],
                     data_name: str, resize: str | None = None, report: Report = lambda line: None) -> Calibration:
    """Score images as requests are scored, and write the bundle with its verdict fitted to them.

    Args:
        folder: of the bundle.
        out: the new bundle's folder; must not exist.
        fit: image files, or uint8 ``(H, W, C)``; the density of statistics is fitted to them. Never trained on.
        calibrate: others, never trained on.
        data_name: what they are, for the manifest.
        resize: ``fit`` brings images of other sizes to the model's, as requests with that parameter are; ``None`` leaves
            them out.
        report: is told of progress, a line at a time.

    Raises:
        BundleError: the bundle is not whole.
        CalibrationError: ``out`` exists or was written by another process meanwhile, too few images, or scores that cannot
            be used.
    """
    if out.exists():
        raise CalibrationError(f"{out} exists: calibrate into a new folder")
    bundle = verify_bundle(folder)
    if "score" not in bundle.operations:
        raise CalibrationError(f"{bundle.name} cannot score: it was trained without an inference network")
    # Without the verdict that it may have had: it is replaced, and may be of an older version.
    files = {name: digest for name, digest in bundle.manifest["files"].items() if name != CALIBRATION_NAME}
    engine = InferenceEngine(Bundle(folder, {**bundle.manifest, "files": files}), device="cpu", operations=["score"])
    fitting = statistics_of(engine, fit, "fitting", resize, report)
    calibration = fit_calibration(fitting, statistics_of(engine, calibrate, "calibration", resize, report), resize=resize)
    with new_folder(out, CalibrationError) as temporary:
        shutil.copytree(folder, temporary, dirs_exist_ok=True)
        (temporary / CALIBRATION_NAME).write_bytes(calibration.to_bytes())
        write_manifest(temporary, {**bundle.manifest, "calibration": {
            **calibration.summary(), "fitted_to": len(fitting["bpd"]), "data": data_name,
            "webp": coder_version()}})
    return calibration


def statistics_of(engine: InferenceEngine, images: Iterable[bytes | np.ndarray], name: str, resize: str | None = None,
                  report: Report = lambda line: None) -> dict[str, np.ndarray]:
    """Statistics by name of many images, a chunk at a time; images that a request could not use are left out.

    Args:
        engine: with ``score``.
        images: image files, or uint8 ``(H, W, C)``.
        name: of them, for progress and errors.
        resize: as for :func:`calibrate_bundle`.
        report: is told of progress.

    Raises:
        CalibrationError: no image could be used.
    """
    chunks: list[dict[str, np.ndarray]] = []
    skipped: list[ApiError] = []
    waiting: list[tuple[int, np.ndarray]] = []
    done = 0

    def flush() -> None:
        nonlocal done
        if waiting:
            found = engine.statistics(np.stack([pixels for _, pixels in waiting]))
            finite = np.isfinite(np.stack(list(found.values()))).all(0)
            skipped.extend(unusable("not_finite", "its likelihood is not a finite number").at(waiting[row][0])
                           for row in np.flatnonzero(~finite))
            chunks.append({key: values[finite] for key, values in found.items()})
            done += len(waiting)
            waiting.clear()
            report(f"{name}: scored {done} images")

    for index, source in enumerate(images):
        image = prepare_image(source, engine.image_shape, resize == "fit", index)
        if isinstance(image, InputImage):
            waiting.append((index, image.pixels))
        else:
            skipped.append(image)
        if len(waiting) == CHUNK:
            flush()
    flush()
    if skipped:
        report(f"{name}: left out {len(skipped)} images: {_examples(skipped)}")
    if not chunks:
        raise CalibrationError(f"{name}: none of {len(skipped)} images could be used" +
                               (f": {_examples(skipped)}" if skipped else ""))
    return {key: np.concatenate([chunk[key] for chunk in chunks]) for key in chunks[0]}


def _examples(errors: Sequence[ApiError]) -> str:
    shown = "; ".join(f"image {e.index}: {e.message}" for e in errors[:MAX_SKIPPED_SHOWN])
    return shown + ("; …" if len(errors) > MAX_SKIPPED_SHOWN else "")
