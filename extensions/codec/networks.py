"""The codec of a bundle: its networks in ONNX Runtime, and the constants between them."""

from __future__ import annotations

import hashlib
import io
import json
from importlib import metadata
from typing import Any

import numpy as np

from ade_base.system import cpu_session, numerics
from extensions.codec.errors import CodingError, NotCoded
from extensions.codec.lattice import Bins, Rotation
from extensions.codec.positions import LearnedBins
from serving.engine.bundle import (
    WEIGHTS_NAME,
    Bundle,
)

# Beside these two, the codec has graphs named codec-*.onnx.
CODEC_NAME = "codec.json"
CODEC_VERSION = 2  # of that file; 1 had rotations as Givens rotations of pairs of channels
CODEC_ARRAYS_NAME = "codec.npz"


class Networks:
    """The graphs and constants of a bundle's codec. Every graph takes one image, on one thread.

    Attributes:
        image_shape: ``(H, W, C)``.
        latent_shapes: ``(channels, height, width)`` per level, coarsest first.
        grid_bits: the flow's values are multiples of ``2**-grid_bits``.
        latent_bits: latents are multiples of ``2**-latent_bits``.
        levels: number of levels of latents; 0 for a flow alone, whose ``y`` is standard normal.
        flow: the steps of the flow.
        bins: from pixels to the flow's input, with a learned dequantisation if the model has one.
        rotations: by their names in ``flow``.
        arrays: further constants, float32.

    Args:
        bundle: its files are verified before they are loaded.

    Raises:
        BundleError: a file does not match the manifest.
        CodingError: the bundle has no codec, or one of another version.
    """

    def __init__(self, bundle: Bundle) -> None:
        check_codec(bundle)
        program = json.loads(bundle.file(CODEC_NAME).read_text())
        if program["format_version"] != CODEC_VERSION:
            raise CodingError(
                f"{bundle.folder / CODEC_NAME}: format_version must be {CODEC_VERSION}, got "
                f"{program['format_version']!r}: export the bundle with its codec again"
            )
        with np.load(io.BytesIO(bundle.file(CODEC_ARRAYS_NAME).read_bytes())) as file:
            arrays = {name: file[name] for name in file.files}
        self.image_shape = bundle.image_shape
        self.grid_bits: int = program["grid_bits"]
        self.latent_bits: int = program["latent_bits"]
        self.levels: int = program["levels"]
        self.latent_shapes = bundle.latent_shapes if self.levels else []
        self.flow: list[dict[str, Any]] = program["flow"]
        self.bins: Bins | LearnedBins = Bins(arrays.pop("edges"))
        if "corners" in program:
            self.bins = LearnedBins(self.bins, program["corners"], self.run)
        names = {name.rpartition("_")[0] for name in arrays if name.startswith("rotation_")}
        self.rotations = {
            name: Rotation(
                arrays.pop(f"{name}_signs"),
                arrays.pop(f"{name}_steps") / 2.0 ** program["rotation_bits"],
            )
            for name in sorted(names)
        }
        self.arrays = arrays
        self._sessions = _load(bundle)

    def run(self, graph: str, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        """The outputs of one graph, float32.

        Args:
            graph: its name without ``.onnx``.
            inputs: float32, of one image each.

        Raises:
            NotCoded: an output is not finite.
        """
        session, names = self._sessions[graph]
        results: list[np.ndarray] = session.run(
            None, {n: v for n, v in inputs.items() if n in names}
        )
        if not all(np.isfinite(result).all() for result in results):
            raise NotCoded(f"{graph} gives numbers that are not finite")
        return results


def check_codec(bundle: Bundle) -> None:
    """Check that a bundle has a codec.

    Raises:
        CodingError: it has none; the message says why, or how to make it.
    """
    if bundle.has(CODEC_NAME):
        return
    if "score" not in bundle.operations:
        raise CodingError(
            f"{bundle.name} cannot code images: a model of the recipe {bundle.manifest['recipe']} "
            "has no inference network, so it gives images no likelihood"
        )
    raise CodingError(
        f"{bundle.folder} has no codec: give the bundle that made the archive, or make a copy with "
        "a codec by ade export"
    )


def codec_digest(bundle: Bundle) -> str:
    """SHA-256 over the weights and the files of the codec: what both sides must have in common."""
    files = bundle.manifest["files"]
    listed = "".join(f"{name} {files[name]}\n" for name in sorted(_codec_files(bundle)))
    return hashlib.sha256(listed.encode()).hexdigest()


def fingerprint() -> dict[str, str]:
    """What the codec's last digits may depend on."""
    return {**numerics(), "constriction": metadata.version("constriction")}


def _codec_files(bundle: Bundle) -> list[str]:
    names = bundle.manifest["files"]
    graphs = [n for n in names if n.startswith("codec-") and n.endswith(".onnx")]
    return [WEIGHTS_NAME, CODEC_NAME, CODEC_ARRAYS_NAME, *graphs]


def _load(bundle: Bundle) -> dict[str, tuple[Any, set[str]]]:
    bundle.file(WEIGHTS_NAME)  # verified here, because the graphs read it by themselves
    sessions = {}
    for name in _codec_files(bundle):
        path = bundle.file(name)
        if path.suffix == ".onnx":
            session = cpu_session(path)
            sessions[path.stem] = (session, {i.name for i in session.get_inputs()})
    return sessions
