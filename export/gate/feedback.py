"""Feedback on single images: those that a person accepts join a calibration, never the training.

The density stays as it was fitted. Every decision is appended to ``calibrations/feedback.jsonl``
in the bundle, before the calibration changes, so that after a crash no change lacks its record.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ade_base.files import LOCK, locked, naming, read_file
from export.gate.images import REPORT_S
from export.sketch import sketched
from serving.engine.bundle import verify_bundle
from serving.engine.engine import InferenceEngine
from serving.engine.noise import short_digest
from serving.ingest.errors import ApiError
from serving.ingest.picture import prepare_source
from serving.verdict.calibration import Calibration, CalibrationError
from serving.verdict.calibration_file import Calibrations, version_of
from serving.verdict.conformal import conformal_p_values
from serving.verdict.false_alarms import flagging_rank
from serving.verdict.store import FOLDER, check_name, folder_of, path_of, write_calibrations
from training.data import Report
from training.datasets.sketch import HASH_DIGITS

AUDIT = "feedback.jsonl"
ALPHA = 0.01  # at which joining images must leave something to reject
FEW = 10  # fewer images that ade calibrate's calibration rejects may always join
Given = Literal["accept", "reject"]


@dataclass(frozen=True)
class Feedback:
    """What feedback changed.

    Attributes:
        joined: images that are calibration images from now on.
        known: accepted images that were calibration images already, by their file or pixels.
        fitted: accepted images that the density was fitted to, which do not join.
        removed: rejected images that had joined and were taken out again.
        rejected: rejected images that had not joined.
        calibrating: those of them with which ``ade calibrate`` made the calibration: they stay.
        unusable: images without usable statistics; they are not in the audit file.
        before: version of the calibration.
        after: version of the calibration; the same if nothing joined or was removed.
    """

    joined: int
    known: int
    fitted: int
    removed: int
    rejected: int
    unusable: int
    before: str
    after: str
    calibrating: int = 0


@dataclass(frozen=True)
class _Image:
    """One image file with its statistics.

    ``pixels`` is the short digest of its pixels, and ``copies`` has the paths of other files with
    the same pixels by their digests.
    """

    path: Path
    digest: str
    pixels: int
    given: Given
    resized: bool
    statistics: dict[str, np.ndarray]
    copies: dict[str, Path] = dataclasses.field(default_factory=dict)


def give_feedback(
    folder: Path,
    name: str,
    accepted: Sequence[Path],
    rejected: Sequence[Path],
    report: Report = lambda line: None,
    force: bool = False,
) -> Feedback:
    """Let accepted images join a calibration, take rejected ones out of it, and write the audit.

    An accepted image counts once, however often and in whatever file it is given, and once for each
    of two calibrations: for images of the model's size, and for resized images. If it is one of
    the images that ``ade calibrate`` calibrated with, it has been counted. One that the density was
    fitted to does not join: it would look more like the others than a new image does. Services that
    run with the bundle take the calibration over.

    Args:
        folder: of the bundle.
        name: of the calibration; a bundle's own is copied to ``calibrations/default.npz`` first.
        accepted: files of in-distribution images.
        rejected: files of out-of-distribution images.
        report: called with a line for each file that cannot be used, and with how unusual the
            joining images are under the present calibration.
        force: let images join even if nothing like them could be rejected any more, if networks
            were trained on some of them, or if the calibration that feedback changed is gone.

    Raises:
        BundleError: the bundle is not whole, or cannot score.
        CalibrationError: the calibration is missing or damaged, a file is given as both, images
            would join a calibration that was made with another version of libwebp, a network was
            trained on one, or so many unusual images would join that they disable the gate.
    """
    check_name(name)
    folder = folder.resolve()  # a link may be moved meanwhile
    bundle = verify_bundle(folder)
    bundle.check_has("score")
    engine = InferenceEngine(bundle, device="cpu", operations=["score"])
    before = engine.store.usable(name)
    if before.exact is None:
        raise CalibrationError(f"{bundle.name} is not calibrated: ade calibrate does that")
    files: list[tuple[Path, Given]] = [
        *((path, "accept") for path in accepted),
        *((path, "reject") for path in rejected),
    ]
    has_both = before.exact is not before.resized
    images, unusable = _read(engine, files, has_both, report)
    if not images:  # nothing is written, not even a lock file
        return Feedback(0, 0, 0, 0, 0, unusable, before.version, before.version)
    with locked(folder_of(folder) / LOCK, wait=True):
        before = engine.store.usable(name)  # another process may have changed it
        if not force:
            _check_not_lost(folder, name, before.version)
        joining, leaving, fitted, calibrating = _changing(before, images)
        if not force:
            _check_not_trained(joining, sketched(bundle))
        if joining and before.other_coder() is not None:
            raise CalibrationError(
                f"images cannot join, because their statistics may differ: {before.other_coder()}"
            )
        after = before
        if joining or leaving:
            after = _changed(before, joining, leaving, name, bundle.networks)
        disabling = _report_unusual(before, after, joining, report)
        if disabling is not None and not force:
            raise CalibrationError(f"{disabling}, or give the option force")
        _append(folder / FOLDER / AUDIT, images, name, before.version, after.version)
        if joining or leaving:
            write_calibrations(folder, after)
    given = [image.given for image in images]
    return Feedback(
        len(joining),
        given.count("accept") - len(joining) - fitted,
        fitted,
        len(leaving),
        given.count("reject") - len(leaving),
        unusable,
        before.version,
        after.version,
        calibrating,
    )


def _changing(
    before: Calibrations, images: Sequence[_Image]
) -> tuple[list[_Image], dict[str, bool], int, int]:
    """The images that join, those that leave, and how many the density was fitted to.

    Those that leave are the files that joined, with whether these were resized. The last number is
    that of rejected images with which ``ade calibrate`` made the calibration.
    """
    joining: list[_Image] = []
    leaving: dict[str, bool] = {}
    fitted = calibrating = 0
    for image in images:
        calibration = before.of(image.resized)
        joined = None if calibration is None else calibration.joined
        file = None
        if joined is not None:
            file = image.digest if image.digest in joined.files else joined.file_of(image.pixels)
        if image.given == "reject":
            if file is not None:
                leaving[file] = image.resized
            elif calibration and (
                image.pixels in calibration.digests or image.pixels in calibration.fitted_digests
            ):
                calibrating += 1
        elif file is not None or (calibration and image.pixels in calibration.digests):
            continue
        elif calibration and image.pixels in calibration.fitted_digests:
            fitted += 1
        else:
            joining.append(image)
    return joining, leaving, fitted, calibrating


def _check_not_trained(joining: Sequence[_Image], hashes: set[str]) -> None:
    """Check that no network was trained on files that would join.

    Raises:
        CalibrationError: one was, and probably on others of them: ``hashes`` are a sample.
    """
    digests = {digest: path for image in joining for digest, path in image.copies.items()}
    digests |= {image.digest: image.path for image in joining}
    trained = [path for digest, path in digests.items() if digest[:HASH_DIGITS] in hashes]
    if trained:
        raise CalibrationError(
            f"networks of the bundle were trained on {trained[0]}, and probably on more of these "
            "files: they look more like known images than new ones do. Give images that nothing "
            "was trained on, or the option force"
        )


def _report_unusual(
    before: Calibrations, after: Calibrations, joining: Sequence[_Image], report: Report
) -> str | None:
    """Report how unusual the joining images are; returns why they would disable the gate, if so.

    They do if the calibration that ``ade calibrate`` made rejects so many of all accepted images at
    :data:`ALPHA` that, with them, no image like them can be rejected any more. The level counts,
    not the most unusual calibration image, because one outlier can lie far beyond all others. A
    calibration that is too small to reject anything at :data:`ALPHA` is used at a larger alpha: the
    smallest one at which it rejects anything is the level then. They also do if more than half of
    those images, and :data:`FEW` or more in all, would pass.
    """
    disabling = None
    for resized in sorted({image.resized for image in joining}):
        calibration, larger = before.of(resized), after.of(resized)
        assert calibration is not None and larger is not None and larger.joined is not None
        mine = [image for image in joining if image.resized == resized]
        scores = calibration.scores_of(_statistics(mine))
        former = calibration.scores
        if calibration.joined is not None:
            former = former[~np.isin(former, calibration.joined.scores)]
        level = max(ALPHA, 1 / (len(former) + 1))
        rejected = _num_rejected(calibration.scores, scores, level)
        joined = larger.joined.scores
        rare = joined[conformal_p_values(former, joined) <= level]
        p_values = conformal_p_values(larger.scores, rare)
        unusual, passing = len(rare), int((p_values > level).sum())
        rank = flagging_rank(len(larger.scores), level)
        most = max(FEW, rank)
        report(
            f"The gate rejects {rejected} of the {len(mine)} "
            f"{'resized ' if resized else ''}image{'s' if len(mine) > 1 else ''} to be added "
            f"(alpha {level:.2g}). Of all images accepted so far, the original calibration (made "
            f"by ade calibrate) rejects {unusual}; further ones are refused from {most} on, or "
            f"from {FEW} on if more than half of them would pass."
            + (
                f" At alphas below {p_values.max():.2g}, images like these are no longer rejected."
                if unusual
                else ""
            )
        )
        low, _ = calibration.false_alarm_band(level, 0.98, tested=len(mine))
        if rejected < (least := round(low * len(mine))):
            report(
                f"WARNING: of {len(mine)} images like the calibration images, the gate would "
                f"reject at least {least} in 99 of 100 cases. If these are images that a gate let "
                f"pass, more than a share of {level:.2g} of images like them will be rejected at "
                f"alpha {level:.2g}: also give those that it rejected by mistake"
            )
        which = f"{passing} of these" if passing < unusual else "these"
        is_disabled = unusual >= most or (unusual >= FEW and 2 * passing > unusual)
        if _num_rejected(former, scores, level) and is_disabled:
            disabling = (
                f"ade calibrate's calibration rejects {unusual} of all accepted images, so that "
                f"images like {which} are no longer rejected at alpha {level:.2g}: check that "
                "these are the right images"
            )
        elif passing:
            report(f"images like {which} {unusual} are no longer rejected at alpha {level:.2g}")
    return disabling


def _num_rejected(calibrating: np.ndarray, scores: np.ndarray, alpha: float) -> int:
    return int((conformal_p_values(calibrating, scores) <= alpha).sum())


def _read(
    engine: InferenceEngine,
    files: Sequence[tuple[Path, Given]],
    has_both: bool,
    report: Report,
) -> tuple[list[_Image], int]:
    """The usable images, each once, and how many are not usable.

    With a calibration for each kind (``has_both``), a picture counts once as an image of the
    model's size and once as a resized one.
    """
    found: dict[tuple[bool, int], _Image] = {}
    unusable = 0
    reported = time.monotonic()
    for i, (path, given) in enumerate(files):
        content = b""
        if time.monotonic() - reported > REPORT_S:
            reported = time.monotonic()
            report(f"read {i:,} of {len(files):,} images")

        def read(path: Path = path) -> bytes:
            nonlocal content
            content = read_file(path)
            return content

        image = prepare_source(read, engine.image_shape, True)
        reason = image.message if isinstance(image, ApiError) else None
        if not isinstance(image, ApiError):
            pixels, digest = short_digest(image.pixels), hashlib.sha256(content).hexdigest()
            key = (image.resized and has_both, pixels)
            if key in found:
                if found[key].given != given:
                    raise CalibrationError(f"{path} is given to accept and to reject")
                if digest != found[key].digest:
                    found[key].copies.setdefault(digest, path)
                continue
            statistics = engine.statistics(image.pixels[None])
            if all(np.isfinite(values).all() for values in statistics.values()):
                found[key] = _Image(path, digest, pixels, given, image.resized, statistics)
                continue
            reason = "its likelihood or another statistic is not a finite number"
        report(f"left out {path}: {reason}")
        unusable += 1
    return list(found.values()), unusable


def _changed(
    before: Calibrations,
    joining: Sequence[_Image],
    leaving: Mapping[str, bool],
    name: str,
    networks: str,
) -> Calibrations:
    """Change the calibrations that judge these images; the result has the version of its file."""
    changes: dict[str, Any] = {"name": name, "model": networks}
    if before.exact is before.resized:
        changes["exact"] = changes["resized"] = _moved(before.exact, joining, list(leaving))
    else:
        for field, resized in (("exact", False), ("resized", True)):
            changes[field] = _moved(
                before.of(resized),
                [image for image in joining if image.resized == resized],
                [file for file, was_resized in leaving.items() if was_resized == resized],
            )
    after = dataclasses.replace(before, **changes)
    return dataclasses.replace(after, version=version_of(after.to_bytes()))


def _moved(
    calibration: Calibration | None, joining: Sequence[_Image], leaving: Sequence[str]
) -> Calibration | None:
    if not joining and not leaving:
        return calibration
    if calibration is None:
        raise CalibrationError(
            "images whose size differs from the model's cannot join: there is no calibration "
            "for resized images"
        )
    if joining:
        calibration = calibration.joined_by(
            _statistics(joining),
            [image.digest for image in joining],
            [image.pixels for image in joining],
        )
    if leaving:
        calibration = calibration.left_by(leaving)
    return calibration


def _statistics(images: Sequence[_Image]) -> dict[str, np.ndarray]:
    names = images[0].statistics
    return {name: np.concatenate([image.statistics[name] for image in images]) for name in names}


def _last_version(audit: Path, name: str) -> str | None:
    """The version of a calibration after the last feedback; ``None`` without feedback."""
    version = None
    with contextlib.suppress(FileNotFoundError):
        for line in audit.read_bytes().splitlines():
            with contextlib.suppress(ValueError, TypeError, KeyError):  # of a line that is damaged
                if (one := json.loads(line))["calibration"] == name:
                    version = str(one["version_after"])
    return version


def _check_not_lost(folder: Path, name: str, version: str) -> None:
    """Check that a calibration which feedback changed before still exists.

    Otherwise the bundle's own, which has ``version``, would be copied in its place.

    Raises:
        CalibrationError: it is gone.
    """
    audit, path = folder / FOLDER / AUDIT, path_of(folder, name)
    if not os.path.lexists(path) and _last_version(audit, name) not in (None, version):
        raise CalibrationError(
            f"{path} is gone, although feedback changed it before ({audit}): put it back, or give "
            "the option force to restart from the bundle's own calibration"
        )


def _append(path: Path, images: Sequence[_Image], name: str, before: str, after: str) -> None:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    lines = [
        json.dumps(
            {
                "time": now,
                "file": str(file),
                "sha256": digest,
                "decision": image.given,
                "calibration": name,
                "version_before": before,
                "version_after": after,
            }
        )
        for image in images
        for digest, file in {image.digest: image.path, **image.copies}.items()
    ]
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
    with naming(path, path), open(os.open(path, flags, 0o644), "a+b") as audit:
        # A full disk may have cut the last line off: without its end, this one would be lost too.
        size = audit.seek(0, os.SEEK_END)
        if size and os.pread(audit.fileno(), 1, size - 1) != b"\n":
            audit.write(b"\n")
        audit.write("".join(f"{line}\n" for line in lines).encode())
        audit.flush()
        os.fsync(audit.fileno())
