"""Reads and verifies bundles: folders that hold everything a service needs.

``export`` writes them. No file of a bundle is a pickle. ``manifest.json`` lists every file with its
SHA-256, which is checked right before a file is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ade_base.errors import UserError
from ade_base.files import replacing, sha256_of
from ade_base.messages import printable, show
from ade_client.contract import DEFAULT
from serving.engine.manifest import MANIFEST, REQUIRED, check_types
from serving.engine.signatures import OPERATIONS, needed_by
from serving.verdict.calibration import CalibrationError
from serving.verdict.calibration_file import check_name as check_calibration_name

FORMAT_VERSION = 2  # the score graph of version 1 lacked the outputs that verdicts need
KINDS = ("mean", "density")
MANIFEST_NAME = "manifest.json"
WEIGHTS_NAME = "model.safetensors"
TORCHSCRIPT_NAME = "model.ts"
CALIBRATION_NAME = "calibration.npz"  # the bundle's own; of another one: calibration-NAME.npz
FEATURES_NAME = "features.onnx"
ENCODER_NAME = "encoder.onnx"  # sees the original: export.lite0
EXAMPLE_NAME = "example-{}.png"  # images that calibrated the gate, kept if their owner agreed
_CALIBRATION = re.compile(r"calibration(-(?P<name>.+))?\.npz")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")

_EXAMPLE = re.compile(EXAMPLE_NAME.format("[0-9]"))


class BundleError(UserError, ValueError):
    """The bundle is incomplete, has another format version, or does not match its manifest."""


@dataclass(frozen=True)
class Bundle:
    """A bundle whose manifest has been read. :meth:`file` returns verified paths.

    Attributes:
        folder: path of the bundle.
        manifest: content of ``manifest.json``.
    """

    folder: Path
    manifest: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.manifest["name"])

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(H, W, C)``."""
        height, width, channels = self.manifest["image_shape"]
        return height, width, channels

    @property
    def latent_shapes(self) -> list[tuple[int, int, int]]:
        """``(channels, height, width)`` per level, coarsest first."""
        return [(c, h, w) for c, h, w in self.manifest["latent_shapes"]]

    @property
    def operations(self) -> tuple[str, ...]:
        """The verbs that this model supports."""
        return tuple(self.manifest.get("operations", OPERATIONS))

    def check_has(self, operation: str) -> None:
        """Check that this model supports an operation.

        Raises:
            BundleError: it does not.
        """
        if operation not in self.operations:
            raise BundleError(
                f"{self.name} cannot {operation}: it was trained without an inference network"
            )

    def graphs(self, operations: Iterable[str]) -> list[str]:
        """Names of the graphs that the given operations need, without those the model lacks."""
        return needed_by(operation for operation in operations if operation in self.operations)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of samples. A model without a likelihood cannot draw density samples."""
        return KINDS if "score" in self.operations else KINDS[:1]

    @property
    def model_id(self) -> str:
        """The model's name in answers: its name and 12 digits of the SHA-256 of its weights."""
        return f"{self.name}@{self.manifest['files'][WEIGHTS_NAME][:12]}"

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest, and thereby of every file that it lists."""
        return hashlib.sha256(json.dumps(self.manifest, sort_keys=True).encode()).hexdigest()

    @property
    def calibrations(self) -> list[str]:
        """Names of the calibrations, in order; that of the bundle's own is ``default``."""
        return sorted(filter(None, map(_calibration_of, self.manifest["files"])))

    @property
    def examples(self) -> list[str]:
        """Names of the example images: some that calibrated the gate, small."""
        return sorted(name for name in self.manifest["files"] if _EXAMPLE.fullmatch(name))

    def uncalibrated(self) -> Bundle:
        """The bundle without its calibrations."""
        files = {n: d for n, d in self.manifest["files"].items() if _calibration_of(n) is None}
        return Bundle(self.folder, {**self.manifest, "files": files})

    def has(self, name: str) -> bool:
        """Whether the manifest lists a file."""
        return name in self.manifest["files"]

    def file(self, name: str) -> Path:
        """Verify a file and return its path.

        Raises:
            BundleError: the file is not listed, is missing, or does not match the manifest.
        """
        if not self.has(name):
            raise BundleError(f"{self.folder}: the manifest does not list {name}")
        path = self.folder / name
        if not path.is_file():
            raise BundleError(f"{path} is missing")
        found = sha256_of(path)
        if found != self.manifest["files"][name]:
            raise BundleError(
                f"{path} does not match the manifest: expected SHA-256 "
                f"{self.manifest['files'][name]}, got {found}"
            )
        return path


def calibration_file(name: str) -> str:
    """The name of a calibration's file.

    Raises:
        CalibrationError: a calibration cannot have this name.
    """
    check_calibration_name(name)
    return CALIBRATION_NAME if name == DEFAULT else f"calibration-{name}.npz"


def _calibration_of(file: str) -> str | None:
    """The name of the calibration in a file of a bundle; ``None`` if it is another file."""
    match = _CALIBRATION.fullmatch(file)
    return None if match is None else match["name"] or DEFAULT


def _check_calibrations(folder: Path, manifest: dict[str, Any]) -> None:
    """Check that the manifest lists each calibration, so that nobody can add or remove one.

    Otherwise the bundle's own calibration could decide in the place of another one, and accept
    other images.

    Raises:
        BundleError: it does not.
    """
    files = manifest["files"]
    for file in files:
        name = _calibration_of(file)
        try:
            is_valid = name is None or calibration_file(name) == file
        except CalibrationError:
            is_valid = False
        if name is not None and not is_valid:
            raise BundleError(f"{folder}: a calibration cannot have the name {show(name)}")
    described = dict.fromkeys(manifest.get("calibrations") or {}, "calibrations")
    if manifest.get("calibration"):
        described[DEFAULT] = "calibration"
    for name, field in described.items():
        if name not in map(_calibration_of, files):
            raise BundleError(
                f"{folder}: the manifest describes the calibration {show(name)} in {field}, but "
                "its files lack the SHA-256 of it"
            )
    present = [path.name for path in folder.glob("calibration*.npz")]
    # A folder in which development versions kept them, without their hashes. It may be a link.
    present += ["calibrations"] if os.path.lexists(folder / "calibrations") else []
    unlisted = sorted(set(present) - files.keys())
    if unlisted:
        raise BundleError(
            f"{folder}: the manifest does not list {show(unlisted[0])}: delete it, and make it "
            "again with ade calibrate --name, which writes a new bundle"
        )


def check_name(name: str) -> None:
    """Check that a model's name can be used in URLs, headers and file names.

    Raises:
        BundleError: it cannot.
    """
    if not _NAME.fullmatch(name):
        raise BundleError(
            "a model's name must start with a letter or digit and consist of letters, digits, "
            f"'-', '_' and '.', got {name!r}"
        )


def plain_name(text: str) -> str:
    """Turn any text into a valid model name."""
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower() or "images"


def check_path(folder: Path) -> None:
    """Check that ONNX Runtime can open files below a bundle's folder.

    Raises:
        BundleError: the path is not UTF-8.
    """
    shown = printable(str(folder))
    if shown != str(folder):
        raise BundleError(f"the path of a bundle must be UTF-8, got {shown}")


def open_bundle(folder: Path) -> Bundle:
    """Read a bundle's manifest.

    Raises:
        BundleError: the path is not UTF-8, or the manifest is missing, has another version, or has
            missing or invalid fields.
    """
    check_path(folder)
    path = folder / MANIFEST_NAME
    if folder.is_file():
        raise BundleError(f"{folder} is not a bundle but a file: give its folder, {folder.parent}")
    if not path.is_file():
        inside = sorted(folder.glob(f"*/{MANIFEST_NAME}"))
        raise BundleError(
            f"{folder} is not a bundle: "
            + (f"it has no {MANIFEST_NAME}" if folder.is_dir() else "the folder does not exist")
            + (f"; give the one in it, {inside[0].parent}" if inside else "")
        )
    try:
        manifest = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not JSON: {error}") from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise BundleError(
            f"{path}: format_version must be {FORMAT_VERSION}, got {version!r}: it is a bundle of "
            "another version of this program; export the model again, or change the version"
        )
    try:
        check_types(dict.fromkeys(REQUIRED) | manifest, MANIFEST, "")
    except TypeError as error:
        raise BundleError(f"{path}: {error}") from None
    check_name(manifest["name"])
    if min(manifest["image_shape"]) < 1 or any(
        min(shape) < 1 for shape in manifest["latent_shapes"]
    ):
        raise BundleError(f"{path}: image_shape and latent_shapes must be positive")
    for operation in manifest.get("operations", OPERATIONS):
        if operation not in OPERATIONS:
            raise BundleError(
                f"{path}: operations must be among {', '.join(OPERATIONS)}, got {operation!r}"
            )
    for name in manifest["files"]:
        if Path(name).name != name or name in ("", ".", ".."):
            raise BundleError(f"{path}: {name!r} is not a plain file name")
    if WEIGHTS_NAME not in manifest["files"]:
        raise BundleError(f"{path}: files must list {WEIGHTS_NAME}")
    _check_calibrations(folder, manifest)
    return Bundle(folder, manifest)


def verify_bundle(folder: Path) -> Bundle:
    """Read a bundle and check every file against the manifest.

    Raises:
        BundleError: a file does not match; the error names the first one.
    """
    bundle = open_bundle(folder)
    for name in sorted(bundle.manifest["files"]):
        bundle.file(name)
    return bundle


def write_manifest(folder: Path, fields: dict[str, Any]) -> None:
    """Write ``manifest.json`` with the given fields and the hashes of the folder's files."""
    files = {
        p.name: sha256_of(p)
        for p in sorted(folder.iterdir())
        if p.is_file() and p.name != MANIFEST_NAME and not p.name.startswith(".")
    }
    manifest = {
        "format_version": FORMAT_VERSION,
        **{k: v for k, v in fields.items() if k != "format_version"},
        "files": files,
    }
    with replacing(folder / MANIFEST_NAME, text=True) as file:
        file.write(json.dumps(manifest, indent=2) + "\n")
