"""The bundle: a folder that is everything a service needs. Read and verified here; ``export``
writes it.

Nothing in a bundle is a pickle. Every file is named in ``manifest.json`` with its SHA-256, and is
read only when it matches.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving.engine.manifest import MANIFEST, REQUIRED, check_types
from serving.engine.signatures import OPERATIONS
from serving.files import replacing

FORMAT_VERSION = (
    2  # 1 had graphs that gave a score's parts alone, without what the verdict is made of
)
KINDS = ("mean", "density")
MANIFEST_NAME = "manifest.json"
WEIGHTS_NAME = "model.safetensors"
TORCHSCRIPT_NAME = "model.ts"
CALIBRATION_NAME = "calibration.npz"
FEATURES_NAME = "features.onnx"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class BundleError(ValueError):
    """A bundle that is not whole, not of this version, or not what its manifest says."""


@dataclass(frozen=True)
class Bundle:
    """A bundle whose manifest was read. Ask :meth:`file` for a verified path.

    Attributes:
        folder: where it lies.
        manifest: the whole of ``manifest.json``.
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
        """``(channels, height, width)``, level by level, coarsest first."""
        return [(c, h, w) for c, h, w in self.manifest["latent_shapes"]]

    @property
    def operations(self) -> tuple[str, ...]:
        """Of the four verbs, those that this model has."""
        return tuple(self.manifest.get("operations", OPERATIONS))

    def graphs(self, operations: Iterable[str]) -> list[str]:
        """The graphs of those operations that this model has."""
        own = [
            graph
            for operation in operations
            if operation in self.operations
            for graph in OPERATIONS[operation]
        ]
        return list(dict.fromkeys(own))

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of samples: without a likelihood there is no noise for density samples."""
        return KINDS if "score" in self.operations else KINDS[:1]

    @property
    def model_id(self) -> str:
        """Name and the first 12 digits of the weights' SHA-256: what answers call the model."""
        return f"{self.name}@{self.manifest['files'][WEIGHTS_NAME][:12]}"

    def has(self, name: str) -> bool:
        """Whether the manifest lists a file."""
        return name in self.manifest["files"]

    def file(self, name: str) -> Path:
        """The path of a file, once its content matches the manifest.

        Raises:
            BundleError: it is not listed, not there, or another.
        """
        if not self.has(name):
            raise BundleError(f"{self.folder}: the manifest lists no {name}")
        path = self.folder / name
        if not path.is_file():
            raise BundleError(f"{path} is missing")
        found = sha256_of(path)
        if found != self.manifest["files"][name]:
            raise BundleError(
                f"{path} does not match the manifest: SHA-256 should be "
                f"{self.manifest['files'][name]}, is {found}"
            )
        return path


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_name(name: str) -> None:
    """Make sure that a model can be called so: its name goes into URLs, headers and names of files.

    Raises:
        BundleError: it cannot.
    """
    if not _NAME.fullmatch(name):
        raise BundleError(
            "a model's name has letters, digits, '-', '_' and '.', and begins with one of the first two; "
            f"got {name!r}"
        )


def plain_name(text: str) -> str:
    """A name that a model can have, from any text."""
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower() or "images"


def open_bundle(folder: Path) -> Bundle:
    """Read a bundle's manifest.

    Raises:
        BundleError: no manifest, another version, or fields that are missing or of another kind.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise BundleError(
            f"{folder} is no bundle: "
            + (f"it holds no {MANIFEST_NAME}" if folder.is_dir() else "there is no such folder")
        )
    try:
        manifest = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not JSON: {error}") from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise BundleError(
            f"{path}: format_version must be {FORMAT_VERSION}, got {version!r}; another version's bundle "
            "has to be exported again"
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
    unknown = set(manifest.get("operations", OPERATIONS)) - set(OPERATIONS)
    if unknown:
        raise BundleError(
            f"{path}: operations are some of {', '.join(OPERATIONS)}, got {unknown.pop()!r}"
        )
    for name in manifest["files"]:
        if Path(name).name != name or name in ("", ".", ".."):
            raise BundleError(f"{path}: {name!r} is no plain file name")
    if WEIGHTS_NAME not in manifest["files"]:
        raise BundleError(f"{path}: files must list {WEIGHTS_NAME}")
    return Bundle(folder, manifest)


def verify_bundle(folder: Path) -> Bundle:
    """Read a bundle and check every file against the manifest.

    Raises:
        BundleError: naming the first file that does not match.
    """
    bundle = open_bundle(folder)
    for name in sorted(bundle.manifest["files"]):
        bundle.file(name)
    return bundle


def write_manifest(folder: Path, fields: dict[str, Any]) -> None:
    """Write ``manifest.json`` over the files that now lie in a folder."""
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
