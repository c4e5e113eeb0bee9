"""The contract: parameters and answers of the API's four operations.

A new parameter of a request, or a new field of an answer, is one line here. The check of requests,
the OpenAPI document, and the client's arguments and results follow from it.
"""

from __future__ import annotations

import dataclasses
import io
import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from PIL import Image

from ade_client.model import (
    Above,
    Axes,
    Between,
    Excludes,
    Flag,
    JsonSchema,
    Named,
    NullIs,
    OfBundle,
)

PROBE_HEADER = "X-Ade-Probe"
# Of an answer, the model that gave it; of a request, the only one that may answer it.
MODEL_HEADER = "X-Ade-Model"
SEED_HEADER = "X-Ade-Seed"
MAX_IMAGES = 256
MAX_SEED = 2**63 - 1
MAX_SAMPLES = 64
MAX_TEMPERATURE = 10.0
DEFAULT = "default"  # the name of a bundle's own calibration
NOT_SCORED = "not_scored"  # the code of a decision's reason: the image could not be scored
# Of a level of latents; eps only if it was requested.
ARRAYS = ("mean", "log_scale", "z", "eps")
Choice = Literal["accept", "reject", "no_verdict"]
Kind = Literal["mean", "density"]
KIND = OfBundle(lambda bundle: {"enum": list(bundle.kinds)})
Notes = Annotated[list[str], "conversions of the file, and what limits the result"]
_PER_LEVEL = OfBundle(
    lambda bundle: dict.fromkeys(("minItems", "maxItems"), len(bundle.latent_shapes))
)
_DRAWN = "it applies only to noise that is drawn"


@dataclass(frozen=True, kw_only=True)
class Error:
    """An error as it is written in JSON."""

    code: Annotated[str, "a short name that programs can compare"]
    message: Annotated[str, "what is wrong, what was expected and what was received"]
    index: Annotated[int | None, "which image of the request it is about, if one"] = None


@dataclass(frozen=True, kw_only=True)
class Problem:
    """The body of every answer other than 200, and the entry of an image that cannot be used."""

    error: Error


@dataclass(frozen=True, kw_only=True)
class ImageParameters:
    """The parameters of every operation on images."""

    seed: Annotated[int, Between(0, MAX_SEED), "of the noise"] = 0
    resize: Annotated[
        bool, Flag("fit"), "resize images of another size to the model's instead of refusing them"
    ] = False


@dataclass(frozen=True, kw_only=True)
class GivenLevel:
    """Latents of one level: ``z``, or the noise ``eps`` in all levels of all images."""

    z: Annotated[np.ndarray | None, Axes(3), "latents (c, h, w)"] = None
    eps: Annotated[np.ndarray | None, Axes(3), "standard normal noise (c, h, w)"] = None


@dataclass(frozen=True, kw_only=True)
class GivenLatents:
    """Latents of one image, coarsest level first; further fields are ignored."""

    levels: Annotated[list[GivenLevel], "with z, or in all levels of all images eps"]


@dataclass(frozen=True)
class SampleParameters:
    """The parameters of ``sample``."""

    n: Annotated[
        int,
        Between(1, MAX_IMAGES),
        Excludes("latents", "there are as many images as latents"),
        "images",
    ] = 1
    seed: Annotated[int | None, Between(0, MAX_SEED), "drawn unless given, and in the answer"] = (
        None
    )
    index: Annotated[
        int,
        Between(0, MAX_SEED),
        Excludes("latents", _DRAWN),
        "of the first image: an image depends on seed and index alone",
    ] = 0
    temperature: Annotated[
        float,
        Above(0, MAX_TEMPERATURE),
        Excludes("latents", _DRAWN),
        "multiplies the prior's standard deviations",
    ] = 1.0
    kind: Annotated[Kind, KIND, "the decoder's mean, or a draw from its Gaussian"] = "mean"
    latents: Annotated[
        list[GivenLatents] | None,
        JsonSchema({"minItems": 1, "maxItems": MAX_IMAGES}),
        "decode these instead of drawing n: an answer of encode, with z or else eps of each level",
    ] = None


@dataclass(frozen=True, kw_only=True)
class SampleResult:
    """One sample."""

    image: Annotated[bytes, "a PNG file, whose text says how it was made"]
    seed: int
    index: int


@dataclass(frozen=True, kw_only=True)
class SampleAnswer:
    """Samples in JSON."""

    model: Annotated[str, "name and weights' hash"]
    kind: Kind
    seed: int
    temperature: float
    results: Annotated[list[SampleResult], JsonSchema({"minItems": 1})]


@dataclass(frozen=True, kw_only=True)
class EncodeParameters(ImageParameters):
    """The parameters of ``encode``."""

    eps: Annotated[bool, "also answer the standard normal noise from which each z is drawn"] = False


@dataclass(frozen=True, kw_only=True)
class Level:
    """One image's latents in one level."""

    shape: Annotated[list[int], "(c, h, w)"]
    mean: Annotated[np.ndarray, Axes(3)]
    log_scale: Annotated[np.ndarray, Axes(3)]
    z: Annotated[np.ndarray, Axes(3)]
    eps: Annotated[np.ndarray | None, Axes(3)] = None


@dataclass(frozen=True, kw_only=True)
class EncodeResult:
    """One image's latents."""

    levels: Annotated[list[Level], _PER_LEVEL, "coarsest first"]
    notes: Notes = dataclasses.field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class EncodeAnswer:
    """Latents in JSON."""

    model: Annotated[str, "name and weights' hash"]
    results: Annotated[list[EncodeResult | Problem], JsonSchema({"minItems": 1})]


@dataclass(frozen=True)
class Latents:
    """Latents of several images, as an ``.npz`` holds them.

    Each list has one array per level, coarsest first, float32 ``(N, c, h, w)``. ``eps``, the noise
    that samples ``z``, is empty unless it was requested. ``model`` is the one that encoded, by name
    and weights' hash, or empty if they were read from a file.
    """

    mean: list[np.ndarray]
    log_scale: list[np.ndarray]
    z: list[np.ndarray]
    eps: list[np.ndarray]
    model: str = ""

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays of the ``.npz``; names end with the level, such as ``z_0``."""
        named = {name: getattr(self, name) for name in ARRAYS}
        return {
            f"{name}_{i}": levels[i]
            for i in range(len(self.z))
            for name, levels in named.items()
            if levels
        }

    @classmethod
    def load(cls, data: bytes, model: str = "") -> Latents:
        """Read an ``.npz``."""
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            levels = range(sum(name.startswith("z_") for name in arrays.files))
            mean, log_scale, z, eps = (
                [arrays[f"{name}_{i}"] for i in levels if f"{name}_{i}" in arrays]
                for name in ARRAYS
            )
            return cls(mean, log_scale, z, eps, model)


@dataclass(frozen=True, kw_only=True)
class ReconstructParameters(ImageParameters):
    """The parameters of ``reconstruct``."""

    kind: Annotated[Kind, KIND, "the decoder's mean, or a draw from its Gaussian"] = "mean"


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """One image's reconstruction and its peak signal-to-noise ratio, infinite if both are equal."""

    png: Annotated[bytes, Named("image"), "a PNG file"]
    psnr: Annotated[float, NullIs(math.inf), "decibels; null if the images are equal"]
    notes: Notes = dataclasses.field(default_factory=list)

    @property
    def image(self) -> np.ndarray:
        """The reconstruction, uint8 ``(H, W, C)``."""
        pixels = np.asarray(Image.open(io.BytesIO(self.png)))
        return pixels if pixels.ndim == 3 else pixels[:, :, None]


@dataclass(frozen=True, kw_only=True)
class ReconstructAnswer:
    """Reconstructions in JSON."""

    model: Annotated[str, "name and weights' hash"]
    kind: Kind
    results: Annotated[list[Reconstruction | Problem], JsonSchema({"minItems": 1})]


def _parts(bundle: Any) -> dict[str, Any]:
    levels = (f"kl_{level}" for level in range(len(bundle.latent_shapes)))
    names = ["dequantization", "distortion", "log_det", *levels]
    number = {"type": "number"}
    return {
        "properties": dict.fromkeys([*names, "iwae_gap"], number),
        "required": names,
        "additionalProperties": False,
    }


@dataclass(frozen=True, kw_only=True)
class ScoreParameters(ImageParameters):
    """The parameters of ``score``."""

    samples: Annotated[
        int,
        Between(1, MAX_SAMPLES),
        "draws K: 1 gives the ELBO, more the importance-weighted bound; the decision stays the "
        "same",
    ] = 1
    alpha: Annotated[
        float, Above(0, 1), "false-alarm rate: an image is rejected if its p_value is at most alpha"
    ] = 0.01
    fdr: Annotated[
        float | None,
        Above(0, 1),
        "largest expected share of false alarms among the images of the request that are reported",
    ] = None
    explain: Annotated[bool, "include the most unusual statistics, with their p-values"] = True
    map: Annotated[bool, "include the bits of each pixel, and the p-values of parts (regions)"] = (
        False
    )
    calibration: Annotated[str, "name of the calibration that decides"] = DEFAULT


@dataclass(frozen=True, kw_only=True)
class CalibrationLabel:
    """Which calibration decided."""

    name: str
    version: Annotated[str, "the first digits of its file's SHA-256"]


@dataclass(frozen=True)
class Unusual:
    """One statistic of an image; ``p_value`` is two-sided, by this statistic alone."""

    statistic: str
    value: float
    p_value: float


@dataclass(frozen=True, kw_only=True)
class Map:
    """The bits of each pixel, float64 ``(H, W)``, and the same as a picture."""

    bits: Annotated[np.ndarray, Axes(2), "they sum to bpd times the number of the image's values"]
    png: Annotated[bytes, "a heat map, in which darker pixels cost less"]


@dataclass(frozen=True, kw_only=True)
class Regions:
    """Where an image is unusual: p-values of its parts, in a grid that covers the original.

    If parts with a p-value of at most alpha are marked, at most a share alpha of the images that
    are like the calibration images gets any mark. The place is in pixels of the upright original;
    at its edges, the grid may lie half a cell outside or inside.
    """

    p_values: Annotated[np.ndarray, Axes(2), "of each cell, from the top, rounded up to 4 digits"]
    left: float
    top: float
    width: Annotated[float, "of the whole grid"]
    height: Annotated[float, "of the whole grid"]
    image_width: Annotated[int, "of the original"]
    image_height: Annotated[int, "of the original"]


@dataclass(frozen=True, kw_only=True)
class ScoreResult:
    """One image's bits per dimension, the verdict (``None`` if there is none) and the decision.

    Let an image through if it is :attr:`accepted`. If the decision is ``no_verdict``, ``ood`` is
    ``None``, and the image is not accepted.
    """

    bpd: Annotated[float, "bits per dimension, an upper bound; lower is likelier"]
    bpd_parts: Annotated[dict[str, float], OfBundle(_parts), "they sum to bpd"]
    standard_error: Annotated[float | None, "of bpd over its draws; null for one draw"]
    ood_score: Annotated[
        float | None,
        "higher is more unusual: minus the log-density of the statistics in nats, and what the "
        "bundle's encoder adds if there is one",
    ]
    p_value: Annotated[float | None, Above(0, 1)]
    ood: Annotated[
        bool | None, "whether p_value is at most alpha; null if the decision is no_verdict"
    ]
    discovery: Annotated[
        bool | None,
        JsonSchema({"type": ["boolean", "null"]}),
        "with fdr: whether the image is reported at this rate; null without a verdict",
    ] = None
    explain: Annotated[list[Unusual], "the most unusual statistic first"] = dataclasses.field(
        default_factory=list
    )
    map: Annotated[Map | None, "with the parameter map"] = None
    regions: Annotated[
        Regions | None, "with the parameter map, if the calibration judges parts of an image"
    ] = None
    notes: Notes = dataclasses.field(default_factory=list)
    decision: Annotated[
        Choice, "accept, reject, or no_verdict if no decision is possible: let only accept through"
    ]
    decision_reason: Annotated[str | None, "why there is no verdict: a code and an explanation"]
    calibration: Annotated[
        CalibrationLabel | None, "that decided; left out if there is none for this image"
    ] = None

    @property
    def accepted(self) -> bool:
        """Whether a calibrated verdict at this alpha found nothing unusual.

        Also false if the answer contradicts itself, as only another program's can.
        """
        has_verdict = self.p_value is not None and self.p_value > 0  # NaN is not
        return self.decision == "accept" and self.ood is False and has_verdict

    @property
    def bits(self) -> np.ndarray | None:
        """The bits of each pixel, if they were requested."""
        return None if self.map is None else self.map.bits

    @property
    def heat_map(self) -> bytes | None:
        """The bits of each pixel as a PNG file, if they were requested."""
        return None if self.map is None else self.map.png


@dataclass(frozen=True, kw_only=True)
class Group:
    """The images of a request that have a verdict, judged together."""

    images: int
    p_value: Annotated[float, Above(0, 1), "of all images (Simes)"]
    fdr: float | None = None
    discoveries: int | None = None
    rejected: Annotated[int | None, "how many images are rejected individually, at alpha"] = None
    notes: Annotated[list[str], "what limits the group's figures"] = dataclasses.field(
        default_factory=list
    )


@dataclass(frozen=True, kw_only=True)
class ScoreAnswer:
    """Scores in JSON."""

    model: Annotated[str, "name and weights' hash"]
    estimator: Annotated[str, JsonSchema({"pattern": "^(elbo|iwae-[0-9]+)$"})]
    samples: int
    alpha: float
    group: Annotated[Group | None, "if at least two images have a verdict"] = None
    results: Annotated[list[ScoreResult | Problem], JsonSchema({"minItems": 1})]
