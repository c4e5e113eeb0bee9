"""Calibrates a bundle: scores held-out images with the serving engine and fits the verdict to them.

The result is a new bundle: nothing changes a bundle in place.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ade_base.files import new_folder, sha256_of
from ade_base.messages import counted
from ade_base.pictures.ignored import Ignored
from ade_base.pictures.show import coder_version
from ade_base.pictures.view import Look
from ade_client.contract import DEFAULT
from export.copying import copy_bundle
from export.feature_source import CHECKED, FeatureSource
from export.gate.density_fit import MIN_IMAGES
from export.gate.examples import Examples
from export.gate.images import Images, counting, prepared, usable
from export.gate.known_bad import check_can_teach, others_than, read_known_bad
from export.gate.network_checks import knows_classes, warn_if_seen
from export.gate.pair import Looks, Parts, exact_calibration, looks, resized_calibration
from serving.engine.bundle import (
    CALIBRATION_NAME,
    ENCODER_NAME,
    FEATURES_NAME,
    Bundle,
    BundleError,
    calibration_file,
    check_path,
    open_bundle,
    verify_bundle,
    write_manifest,
)
from serving.engine.engine import InferenceEngine
from serving.engine.noise import image_digest
from serving.ingest.picture import LookOf, Picture, no_look
from serving.verdict.calibration import Calibration, CalibrationError
from serving.verdict.calibration_file import CalibrationPair, version_of
from training.data import REPEATS, Report

# The repository's one copy.
ENCODER_SHA256 = "53dabb1caa9b9c6f814f81cf0c2f29ad7cfa18106fc3d587822044e0a454db2e"
SHIPPED_ENCODER = Path(__file__).parents[2] / "pretrained" / "cifar10" / ENCODER_NAME
ENOUGH = MIN_IMAGES * 5 // 2  # images, of which ade calibrate takes two fifths for the density


def calibrate_bundle(
    folder: Path,
    out: Path,
    fit: Images,
    calibrate: Images,
    data_name: str,
    report: Report = lambda line: None,
    features: FeatureSource | None = None,
    unseen: Images = (),
    trained: Images = (),
    keep_examples: bool = False,
    calibration: str = DEFAULT,
    sees_originals: bool | None = None,
    known_bad: Images = (),
    ignored: Ignored | None = None,
    detail: int = 1,
) -> CalibrationPair:
    """Score images as requests are scored, and write a new bundle with its verdict fitted to them.

    There is one calibration for images of the model's size and one for resized images. Each uses
    the images of its own kind alone if they are at least half of all. Otherwise it uses all images:
    for the first, images of other sizes are resized as requests resize them; for the second, images
    of the model's size go through :func:`export.gate.pair.resize_and_back`.

    Images with the pixels of a training image are left out, and so are those with the pixels of
    another one, of either part if they are to be fitted to. From :data:`training.data.REPEATS` on,
    equal images of those that calibrate all count, also with the pixels of a training image.

    Args:
        folder: of the bundle.
        out: the new bundle's folder; must not exist.
        fit: image files, or uint8 ``(H, W, C)``; the density of statistics is fitted to them. They
            must not be training images.
        calibrate: other images, which must not be training images either.
        data_name: describes the images in the manifest.
        report: called with each line of progress.
        features: a network whose features join the statistics; the bundle keeps its own unless
            given. With another network the other calibrations are invalid and left out.
        unseen: images of the same kind on which neither the model nor that network was trained.
            They reveal whether the network was trained on the others.
        trained: images that the model or that network was trained on, of which the others may hold
            copies: these are left out too.
        keep_examples: keep a few of the images that calibrate in the bundle, small. Whoever can
            open the bundle or its page sees them.
        sees_originals: whether an encoder sees the whole originals; it does in any case if the
            bundle has one. ``None``: if most images are larger than the model. Without effect if
            ``features`` are given.
        known_bad: images that the gate should reject. A third of those that would calibrate is
            kept to tell them from good ones (:mod:`export.gate.teach`).
        ignored: regions of all images that nothing looks at.
        detail: how many times finer the encoder looks at images larger than the model, in each
            direction.
        calibration: the name of the calibration; requests that give none are judged by that of
            :data:`serving.verdict.calibration_file.DEFAULT`. One of this name is replaced.

    Raises:
        BundleError: the bundle is not whole, cannot score, or was replaced meanwhile, or the
            encoder's file is damaged.
        FeaturesError: the network cannot be used.
        CalibrationError: ``out`` exists or was written by another process meanwhile, too few
            images, examples of images with ignored regions, detail that nothing sees, the name
            cannot be used, or scores cannot.
    """
    check_out(out)
    if ignored is not None and keep_examples:  # which are small, and refused as of another size
        raise CalibrationError("examples cannot be kept in a bundle that ignores regions")
    file = calibration_file(calibration)
    bundle = verify_bundle(folder)
    examples = Examples(bundle.image_shape)
    encoder = _encoder(bundle, sees_originals, report) if features is None else None
    large = looks(encoder is not None, ignored, detail)[1]
    look_of = lambda resized: large if resized else Look(0, ignored)
    named = read_known_bad(known_bad, bundle.image_shape, look_of, report)
    parts = _parts(bundle, fit, examples.passing(calibrate), trained, report, look_of)
    are_large = 2 * sum(i.resized for part in parts for i in part) >= sum(map(len, parts))
    bad = others_than(parts, named, report)
    is_seen = encoder is not None and (sees_originals or are_large or bundle.has(ENCODER_NAME))
    if detail > 1 and not (is_seen and are_large):
        raise CalibrationError(
            "more detail needs images larger than the model, which the encoder of originals sees"
        )
    if bad:
        check_can_teach(parts, is_seen or features is not None or bundle.has(FEATURES_NAME))
    with new_folder(out, CalibrationError) as temporary:
        copy_bundle(bundle, temporary)
        for name in bundle.examples:  # of the former calibration
            (temporary / name).unlink()
        if keep_examples:
            report(f"kept {examples.write(temporary)} of these images, small, as examples")
        fields = bundle.manifest
        if features is not None:
            fields = {**fields, "features": _add_features(temporary, features, parts, report)}
            if sha256_of(temporary / FEATURES_NAME) != bundle.manifest["files"].get(FEATURES_NAME):
                fields = _without_calibrations(temporary, fields, calibration, report)
            write_manifest(temporary, fields)
        if encoder is not None and is_seen:
            if not bundle.has(ENCODER_NAME):
                copied = shutil.copyfile(encoder, temporary / ENCODER_NAME)
                if sha256_of(copied) != ENCODER_SHA256:
                    raise BundleError(f"{encoder} is damaged: get it again, from the repository")
                write_manifest(temporary, fields)
            report(f"{ENCODER_NAME}: EfficientNet-Lite0 sees each image, whole")
        own = _own_calibration(bundle) if features is None else None
        sees = looks(is_seen, ignored, detail)
        made, about = _calibrate(open_bundle(temporary), parts, own, report, unseen, sees, bad)
        content = made.to_bytes()
        (temporary / file).write_bytes(content)
        about["data"] = data_name
        if calibration == DEFAULT:
            fields = {**fields, "calibration": about}
        else:
            others = fields.get("calibrations") or {}
            fields = {**fields, "calibrations": {**others, calibration: about}}
        write_manifest(temporary, fields)
    return dataclasses.replace(made, name=calibration, version=version_of(content))


def check_out(out: Path) -> None:
    """Check that the folder for a new bundle can become one.

    Raises:
        BundleError: its path is not UTF-8.
        CalibrationError: it exists.
    """
    check_path(out)
    if os.path.lexists(out):
        raise CalibrationError(f"{out} exists: calibrate into a new folder")


def _parts(
    bundle: Bundle,
    fit: Images,
    calibrate: Images,
    trained: Images,
    report: Report,
    look_of: LookOf = no_look,
) -> Parts:
    bundle.check_has("score")

    def read(name: str, images: Images) -> list[Picture]:
        found, _ = usable(name, images, bundle.image_shape, report, True, look_of)
        return found

    given = read("fitting", fit), read("calibration", calibrate)
    trained_on = _digests(trained, bundle.image_shape, report, Look(0, look_of(True).ignored))
    # A picture that repeats, such as a camera's black frame, repeats in use, too: if it calibrates,
    # it counts as often as it occurs, and does not also fit the density. A few copies are files
    # that were stored twice: they do not make the false-alarm rate any surer.
    counts = Counter(image_digest(image.pixels) for image in given[1])
    often = {digest: count for digest, count in counts.items() if count >= REPEATS}
    seldom = trained_on - often.keys()
    calibrating = _without(seldom, given[1], "calibration", "training images", report)
    # Of pictures that both parts have, two fifths fit the density, too, chosen by their pixels.
    both = {image_digest(image.pixels) for image in given[0]} & counts.keys() - often.keys()
    to_fit = {digest for digest in both if digest[0] < 256 * 2 / 5}
    calibrating = _without(to_fit, calibrating, "calibration", "others", report, often)
    if often:
        report(
            f"calibration: {sum(often.values())} images are copies of "
            f"{counted(len(often), 'picture')}, {REPEATS} or more of each, and count as often as "
            "they occur. If these do not repeat like this in use, remove the copies: otherwise "
            "more images will be rejected than stated below"
        )
    known = trained_on | {image_digest(image.pixels) for image in calibrating}
    parts = _without(known, given[0], "fitting", "others", report, may_repeat=()), calibrating
    height, width, _ = bundle.image_shape
    resized = sum(image.resized for part in parts for image in part)
    report(
        f"{sum(map(len, parts))} images: {len(parts[0])} fit the density of statistics, "
        f"{len(parts[1])} set the false-alarm rate"
        + (
            f"; {resized} {'was' if resized == 1 else 'were'} resized to {width} x {height} pixels"
            if resized
            else ""
        )
    )
    if min(map(len, parts)) < MIN_IMAGES and sum(map(len, parts)) < ENOUGH:
        raise CalibrationError(
            f"at least {ENOUGH} usable images are needed (two fifths of them, at least "
            f"{MIN_IMAGES}, fit the density), got {sum(map(len, parts))}"
        )
    if min(map(len, parts)) < MIN_IMAGES:
        raise CalibrationError(
            f"without copies and unusable files, {len(parts[0])} images are left to fit the "
            f"density and {len(parts[1])} to set the false-alarm rate: each needs at least "
            f"{MIN_IMAGES}"
        )
    return parts


def _encoder(bundle: Bundle, sees_originals: bool | None, report: Report) -> Path | None:
    """The encoder's file; ``None`` if no encoder is to see these images."""
    if bundle.has(ENCODER_NAME):
        return bundle.file(ENCODER_NAME)
    if sees_originals is False or bundle.image_shape[2] not in (1, 3):
        return None
    if not SHIPPED_ENCODER.is_file():
        report(
            f"WARNING: there is no {SHIPPED_ENCODER}, so no encoder sees the originals of images"
        )
        return None
    return SHIPPED_ENCODER


def _add_features(
    folder: Path, features: FeatureSource, parts: Parts, report: Report
) -> dict[str, Any]:
    """Write the features' network into a bundle; returns its entry in the manifest."""
    from export.features import feature_graph  # needs onnx, which calibration alone does not

    graph = feature_graph(features, np.stack([image.pixels for image in parts[0][:CHECKED]]))
    (folder / FEATURES_NAME).write_bytes(graph.content)
    about = graph.about
    report(
        f"features of {features.path.name}: {about['features']}, "
        f"{about['classes'] or 'no'} classes; input {about['preprocessing']}"
    )
    return about


def _without_calibrations(
    folder: Path, fields: dict[str, Any], replaced: str, report: Report
) -> dict[str, Any]:
    """Delete the calibrations of a bundle, which belong to the former features' network.

    Returns:
        The fields of the manifest without them.
    """
    names = open_bundle(folder).calibrations
    for name in names:
        (folder / calibration_file(name)).unlink()
    others = [name for name in names if name != replaced]
    if others:
        report(
            f"left out the calibrations {', '.join(others)}: they were made for other features; "
            "ade calibrate makes them again"
        )
    return {**fields, "calibration": None, "calibrations": None}


def _calibrate(
    bundle: Bundle,
    parts: Parts,
    own: Calibration | None,
    report: Report,
    unseen: Images,
    sees: Looks,
    bad: Sequence[Picture],
) -> tuple[CalibrationPair, dict[str, Any]]:
    """The calibrations, and their entry in the manifest."""
    # Without the former calibration, which is replaced and may have an older format.
    engine = InferenceEngine(bundle.uncalibrated(), device="cpu", operations=["score"])
    has_classes = knows_classes(own, engine, parts, report)
    exact, about = exact_calibration(engine, parts, has_classes, report, sees, bad)
    warn_if_seen(engine, exact, unseen, report)
    resized, about_resized = (
        (exact, about)
        if all(image.resized for part in parts for image in part)
        else resized_calibration(engine, parts, has_classes, report, sees, bad)
    )
    for calibration in (exact, resized):
        calibration.check_values()
    return CalibrationPair(exact, resized, webp=coder_version()), {
        **about,
        "webp": coder_version(),
        "resized": about_resized,
    }


def _own_calibration(bundle: Bundle) -> Calibration | None:
    try:
        return CalibrationPair.load(bundle.folder / CALIBRATION_NAME).exact
    except CalibrationError:  # the bundle has none, or it is of an earlier version
        return None


def _digests(
    trained: Images, image_shape: tuple[int, int, int], report: Report, look: Look
) -> set[bytes]:
    """The digests of training images at the model's size."""
    images = prepared(trained, image_shape, True, lambda resized: look)
    return {
        image_digest(image.pixels)
        for _, image in counting("training", images)
        if isinstance(image, Picture)
    }


def _without(
    seen: set[bytes],
    images: list[Picture],
    name: str,
    originals: str,
    report: Report,
    may_repeat: Collection[bytes] | None = None,
) -> list[Picture]:
    """The images whose pixels were not seen before.

    Args:
        seen: digests of those that were.
        images: to choose from.
        name: of the images.
        originals: what those that were seen before are, for messages.
        report: called with a line if images are left out.
        may_repeat: digests of those of which equal images are all kept, and of others only the
            first; ``None`` for all.

    Raises:
        CalibrationError: all of them were seen before.
    """
    seen, kept = set(seen), []
    for image in images:
        digest = image_digest(image.pixels)
        if digest not in seen:
            kept.append(image)
            if may_repeat is not None and digest not in may_repeat:
                seen.add(digest)
    if len(kept) < len(images):
        left_out = counted(len(images) - len(kept), "image")
        report(f"{name}: left out {left_out}: copies of {originals}")
    if images and not kept:
        raise CalibrationError(f"{name}: all of {len(images)} images are copies of {originals}")
    return kept
