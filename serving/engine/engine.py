"""The four verbs on NumPy arrays.

This module knows bundles and graphs, but not HTTP. Each result depends only on its own image or
latents, its seed and, for samples, its index, never on the rest of the batch: all noise comes from
:mod:`serving.engine.noise`. With ONNX Runtime on the CPU its bytes do not depend on the size of the
batch either; with other backends the last digits may.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ade_base.messages import show
from ade_base.pictures.view import LARGE, SMALL, View
from ade_client.contract import DEFAULT
from serving.engine.backends import Backend, OnnxRuntimeBackend, load_backend
from serving.engine.bundle import ENCODER_NAME, FEATURES_NAME, Bundle, open_bundle
from serving.engine.calibrations import open_calibrations
from serving.engine.noise import NoiseStream, image_digest, image_key, sample_key
from serving.engine.signatures import OPERATIONS, input_shape, inputs_of
from serving.verdict.calibration import Calibration, Verdict
from serving.verdict.calibration_file import CalibrationPair, UnknownCalibration
from serving.verdict.encoder import INSIDE, PATCHES, POOLED
from serving.verdict.semantic import FEATURES
from serving.verdict.statistics import (
    compute_statistics,
    finite_rows,
    part_names,
)

MAX_ROWS = 32  # larger batches are not faster (docs/performance.md)
ENCODER = ENCODER_NAME.removesuffix(".onnx")
ENCODER_PIXELS = 8 * SMALL**2  # of the views in a batch: eight small ones are fastest
BUCKETS = (1, 2, 4, 8, 16, 32)  # batch sizes for backends with fixed sizes


@dataclass(frozen=True)
class EncodedLevel:
    """Latents of one level for ``N`` images, each float32 ``(N, c, h, w)``.

    ``eps``, if requested, is ``z`` standardised by its prior given the coarser levels: the noise
    from which sampling gives ``z`` again.
    """

    mean: np.ndarray
    log_scale: np.ndarray
    z: np.ndarray
    eps: np.ndarray | None = None


@dataclass(frozen=True)
class Score:
    """Likelihood and verdict of one image.

    Attributes:
        bpd: bits per dimension, an upper bound; lower is more likely.
        parts: terms that sum to ``bpd``, by name.
        standard_error: standard error of ``bpd`` over its ``K`` draws; ``None`` for one draw.
        bits: bits of each pixel, float64 ``(H, W)``. Their sum is ``bpd`` times the number of
            values of the image. ``None`` unless requested.
        verdict: the calibrated verdict; ``None`` if there is no calibration for images like this
            one (resized or not).
        calibrations: the calibrations by which the image was judged.
    """

    bpd: float
    parts: dict[str, float]
    standard_error: float | None
    verdict: Verdict | None
    bits: np.ndarray | None = None
    calibrations: CalibrationPair = dataclasses.field(
        default_factory=CalibrationPair, compare=False, repr=False
    )


class NotFinite(ArithmeticError):
    """The model's likelihood of an image is not finite."""


class InferenceEngine:
    """Sampling, encoding, reconstruction and scoring with one bundle.

    Args:
        bundle: an opened bundle or its path.
        backend: ``onnxruntime`` or ``torchscript``.
        device: ``auto``, ``cpu`` or ``cuda``.
        operations: the operations to load. Those that the bundle lacks are skipped.
        gpu: index of the GPU.
        cuda_graphs: see :func:`serving.engine.backends.load_backend`.

    Attributes:
        named: the calibrations by name; empty without the operation ``score``.

    Methods that take images raise :class:`ValueError` unless these are uint8 ``(N, H, W, C)`` of
    the model's size, with at least one image.

    Example::

        engine = InferenceEngine(Path("pretrained/cifar10"))
        images = engine.sample(seeds=[7, 7], indices=[0, 1])   # uint8 (2, 32, 32, 3)
        [score.bpd for score in engine.score(images)]
    """

    def __init__(
        self,
        bundle: Bundle | Path,
        backend: str = "onnxruntime",
        device: str = "auto",
        operations: Iterable[str] = tuple(OPERATIONS),
        gpu: int = 0,
        cuda_graphs: bool = False,
    ) -> None:
        self.bundle = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
        operations = tuple(operations)
        graphs = self.bundle.graphs(operations)
        self.backend: Backend = load_backend(self.bundle, graphs, backend, device, gpu, cuda_graphs)
        self._features: Backend | None = None
        # Not "in graphs": encoding runs the graph of scores for its noise, but gives no verdict.
        if self.bundle.has(FEATURES_NAME) and "score" in operations:
            self._features = OnnxRuntimeBackend(
                self.bundle,
                [FEATURES],
                device if backend == "onnxruntime" else "cpu",
                gpu,
                cuda_graphs,
            )
        self.named = open_calibrations(self.bundle) if "score" in operations else {}
        self._encoder: Backend | None = None
        if self.bundle.has(ENCODER_NAME) and (
            any(its.has_encoder for its in self.named.values()) or not self.bundle.calibrations
        ):
            self._encoder = OnnxRuntimeBackend(
                self.bundle, [ENCODER], device if backend == "onnxruntime" else "cpu", gpu, False
            )
        self.image_shape = self.bundle.image_shape
        self.latent_shapes = self.bundle.latent_shapes
        self._levels = len(self.latent_shapes)
        self._graphs = graphs

    @property
    def calibrations(self) -> CalibrationPair:
        """The bundle's own calibrations."""
        return self.calibrations_of(DEFAULT)

    @property
    def versions(self) -> dict[str, str]:
        """Versions of all calibrations by name; empty for one that judges nothing."""
        return {name: its.version for name, its in self.named.items()}

    def calibrations_of(self, name: str) -> CalibrationPair:
        """The calibrations of a name.

        Raises:
            UnknownCalibration: there are none; the error lists the existing ones.
        """
        if name not in self.named:
            raise UnknownCalibration(
                f"there is no calibration {show(name)}; there are {', '.join(sorted(self.named))}"
            )
        return self.named[name]

    @property
    def calibration(self) -> Calibration | None:
        """The calibration for images of the model's size."""
        return self.calibrations.exact

    def warm_up(self) -> None:
        """Run every loaded graph once at each batch size, so that no request pays for set-up."""
        sizes = BUCKETS if self.backend.fixed_sizes else (1, MAX_ROWS)
        for graph, size in itertools.product(self._graphs, sizes):
            inputs = {
                name: np.zeros(
                    (size, *self._shape(name)), np.uint8 if name == "images" else np.float32
                )
                for name in inputs_of(graph, self._levels)
            }
            self.backend.run(graph, inputs)
        for size in BUCKETS if self._features is not None and self._features.fixed_sizes else (1,):
            self.features(np.zeros((size, *self.image_shape), np.uint8))

    def sample(
        self,
        seeds: Sequence[int],
        indices: Sequence[int],
        kinds: Sequence[str] | None = None,
        temperatures: Sequence[float] | None = None,
    ) -> np.ndarray:
        """Sample images; each depends only on its seed, index, kind and temperature.

        Args:
            seeds: one per image.
            indices: one per image.
            kinds: ``mean`` (the default) or ``density``, one per image.
            temperatures: factors of the prior's standard deviations, one per image. Default 1.

        Returns:
            uint8 ``(N, H, W, C)``.
        """
        kinds = kinds or ["mean"] * len(seeds)
        temperatures = temperatures or [1.0] * len(seeds)

        def noise(i: int) -> dict[str, np.ndarray]:
            stream = NoiseStream(sample_key(seeds[i], indices[i]))
            temperature = np.float32(temperatures[i])
            eps = {name: noise * temperature for name, noise in self._eps(stream).items()}
            return {**eps, "y_eps": self._y_eps(stream, kinds[i])}

        return self._run("sample", len(seeds), noise)["images"]

    def decode(
        self, z: Sequence[np.ndarray], seeds: Sequence[int], kinds: Sequence[str] | None = None
    ) -> np.ndarray:
        """Decode latents into images.

        Args:
            z: one array per level, coarsest first, float32 ``(N, c, h, w)``.
            seeds: one per image, used by density images, whose noise also depends on their place.
            kinds: as for :meth:`sample`.

        Returns:
            uint8 ``(N, H, W, C)``.
        """
        return self._images_of("decode", "z", z, seeds, kinds)

    def sample_with(
        self, eps: Sequence[np.ndarray], seeds: Sequence[int], kinds: Sequence[str] | None = None
    ) -> np.ndarray:
        """Sample images from given noise instead of drawn noise.

        Images are equal to those of :meth:`sample` for the same noise; density images if it is the
        noise of their seed and place.

        Args:
            eps: one array per level, coarsest first, float32 ``(N, c, h, w)``. The prior of a level
                depends on the coarser levels; zeros give the mean of that prior.
            seeds: one per image, used by density images, whose noise also depends on their place.
            kinds: as for :meth:`sample`.

        Returns:
            uint8 ``(N, H, W, C)``.
        """
        return self._images_of("sample", "eps", eps, seeds, kinds)

    def _images_of(
        self,
        graph: str,
        name: str,
        given: Sequence[np.ndarray],
        seeds: Sequence[int],
        kinds: Sequence[str] | None,
    ) -> np.ndarray:
        """Run a graph whose inputs are one array per level, named ``NAME_LEVEL``."""
        kinds = kinds or ["mean"] * len(seeds)

        def inputs(i: int) -> dict[str, np.ndarray]:
            arrays = {
                f"{name}_{level}": np.asarray(given[level][i], np.float32)
                for level in range(self._levels)
            }
            stream = NoiseStream(sample_key(seeds[i], i))
            self._eps(stream)  # of a sample of this seed: the given noise may be just that
            return {**arrays, "y_eps": self._y_eps(stream, kinds[i])}

        return self._run(graph, len(seeds), inputs)["images"]

    def encode(
        self,
        images: np.ndarray,
        seeds: Sequence[int] | None = None,
        eps: Sequence[bool] | None = None,
    ) -> list[EncodedLevel]:
        """Compute posterior means, log-scales and one draw of the latents, coarsest level first.

        Args:
            images: uint8 ``(N, H, W, C)``.
            seeds: one per image. Default 0.
            eps: whether to return the draw of each image as noise too. Default no. If only some
                images request it, the noise of the others is zeros.
        """
        self._check(images)
        seeds = seeds or [0] * len(images)

        def inputs(i: int) -> dict[str, np.ndarray]:
            stream = NoiseStream(image_key(seeds[i], image_digest(images[i])))
            return {"images": images[i], **self._eps(stream)}

        out = self._run("encode", len(images), inputs)
        levels = [
            EncodedLevel(out[f"mean_{i}"], out[f"log_scale_{i}"], out[f"z_{i}"])
            for i in range(self._levels)
        ]
        rows = [i for i, wanted in enumerate(eps or []) if wanted]
        if not rows:
            return levels
        # encode dequantises with the median of the positions in each pixel's bin.
        middle = np.full(self.image_shape, 0.5, np.float32)
        names = [f"surprise_{i}" for i in range(self._levels)]
        found = self._run("score", len(rows), lambda n: {**inputs(rows[n]), "u": middle}, names)
        noise = [np.zeros_like(level.z) for level in levels]
        for level, name in zip(noise, names, strict=True):
            level[rows] = found[name]
        return [
            dataclasses.replace(level, eps=its) for level, its in zip(levels, noise, strict=True)
        ]

    def reconstruct(
        self,
        images: np.ndarray,
        seeds: Sequence[int] | None = None,
        kinds: Sequence[str] | None = None,
    ) -> np.ndarray:
        """Encode and decode; uint8 ``(N, H, W, C)`` in and out."""
        self._check(images)
        seeds = seeds or [0] * len(images)
        kinds = kinds or ["mean"] * len(images)

        def inputs(i: int) -> dict[str, np.ndarray]:
            stream = NoiseStream(image_key(seeds[i], image_digest(images[i])))
            eps, y_eps = self._eps(stream), self._y_eps(stream, kinds[i])
            return {"images": images[i], **eps, "y_eps": y_eps}

        return self._run("reconstruct", len(images), inputs)["reconstruction"]

    def score(
        self,
        images: np.ndarray,
        seeds: Sequence[int] | None = None,
        samples: Sequence[int] | None = None,
        maps: Sequence[bool] | None = None,
        resized: Sequence[bool] | None = None,
        calibrations: Sequence[CalibrationPair] | None = None,
        views: Sequence[View | None] | None = None,
    ) -> list[Score | NotFinite]:
        """Compute the bits per dimension of each image, their parts and the verdict.

        Args:
            images: uint8 ``(N, H, W, C)``, what the calibration ignores filled already.
            seeds: one per image. Default 0. The verdict always uses seed 0, as the calibration
                does.
            samples: number of draws K, at least 1, one per image. Default 1. One draw gives the
                ELBO, more give the importance-weighted bound.
            maps: whether to return the bits of each pixel, averaged over the draws. Default no.
            resized: whether the image was resized to the model's size. Resized images have a
                calibration of their own. Default no.
            calibrations: the calibrations that judge each image. Default: the bundle's own.
            views: of the originals, made as :meth:`CalibrationPair.look_of` says. An image that was
                not resized is its own original. One that was resized must have a view if its
                calibration has an encoder.

        Returns:
            One result per image; the error itself where the likelihood is not finite.

        Raises:
            ValueError: the images are not such an array, another argument has not one value per
                image, a number of draws is below 1, or a view is missing or of another size.
        """
        images = np.asarray(images)
        self._check(images)
        for name, given in (
            ("seeds", seeds),
            ("samples", samples),
            ("maps", maps),
            ("resized", resized),
            ("calibrations", calibrations),
            ("views", views),
        ):
            if given is not None and len(given) != len(images):
                raise ValueError(
                    f"{name} must have one value for each of {len(images)} images, got {len(given)}"
                )
        if samples and min(samples) < 1:
            raise ValueError(f"samples must be at least 1, got {min(samples)}")
        seeds = [0] * len(images) if seeds is None else seeds
        samples = [1] * len(images) if samples is None else samples
        maps = [False] * len(images) if maps is None else maps
        resized = [False] * len(images) if resized is None else resized
        calibrations = [self.calibrations] * len(images) if calibrations is None else calibrations
        judges = [its.of(way) for its, way in zip(calibrations, resized, strict=True)]
        seen = [
            None if judge is None else _view(judge, image, is_resized, view)
            for judge, image, is_resized, view in zip(
                judges, images, resized, views or [None] * len(images), strict=True
            )
        ]
        digests = [image_digest(image) for image in images]
        # The verdict uses draw 0 of seed 0: one more draw if the image has another seed.
        plan = [(i, seeds[i], k) for i in range(len(images)) for k in range(samples[i])]
        extra = [(i, 0, 0) for i in range(len(images)) if seeds[i] != 0 and judges[i] is not None]
        draws = plan + extra
        parts: list[np.ndarray] = []
        bits: dict[int, np.ndarray] = {}
        verdicts: dict[int, Verdict] = {}
        wanted = ["parts"] if not any(judges) and not any(maps) else None
        inputs = lambda row: self._draw(images, digests, draws[row])
        for first, outputs in self._batches("score", len(draws), inputs, wanted):
            rows = draws[first : first + len(outputs["parts"])]
            parts.append(outputs["parts"].astype(np.float64))
            verdicts |= self._verdicts(judges, images, seen, rows, outputs)
            for n, (i, _, _) in enumerate(rows):
                if maps[i] and first + n < len(plan):
                    bits[i] = (
                        bits.get(i, 0.0) + outputs["cost"][n].astype(np.float64).sum(0) / samples[i]
                    )
        values = np.concatenate(parts)
        results: list[Score | NotFinite] = []
        start = 0
        for i, k in enumerate(samples):
            mine = values[start : start + k]
            start += k
            if not np.isfinite(mine).all() or judges[i] is not None and i not in verdicts:
                what = "a statistic of this image (of features.onnx, perhaps)"
                if not np.isfinite(mine).all():
                    what = "the model's likelihood of this image"
                results.append(NotFinite(f"{what} is not a finite number"))
                continue
            bpd, named, error = self._summarize(mine)
            if i in bits:
                # The part not attributable to single pixels (the constant of dequantisation, the
                # gap of the bound, rounding) is spread evenly.
                rest = bpd * math.prod(self.image_shape) - bits[i].sum()
                bits[i] = bits[i] + rest / bits[i].size
            results.append(Score(bpd, named, error, verdicts.get(i), bits.get(i), calibrations[i]))
        return results

    def statistics(self, images: np.ndarray, views: Sequence[View] = ()) -> dict[str, np.ndarray]:
        """Compute the statistics behind verdicts, float32 ``(N,)`` by name, for the same draw.

        Args:
            images: uint8 ``(N, H, W, C)``.
            views: of the originals, all of one size, if an encoder counts.
        """
        self._check(images)
        digests = [image_digest(image) for image in images]
        found = [
            self._statistics(images[first : first + len(outputs["parts"])], outputs)
            for first, outputs in self._batches(
                "score", len(images), lambda i: self._draw(images, digests, (i, 0, 0))
            )
        ]
        joined = {name: np.concatenate([batch[name] for batch in found]) for name in found[0]}
        return {**joined, **self.encoded(views)} if views else joined

    def _statistics(
        self, images: np.ndarray, outputs: dict[str, np.ndarray], with_features: bool = True
    ) -> dict[str, np.ndarray]:
        features = self.features(images) if with_features else {}
        return compute_statistics(images, {**outputs, **features})

    def encoded(self, views: Sequence[View]) -> dict[str, np.ndarray]:
        """Run the encoder on views of one size.

        Returns:
            ``pooled``, float32 ``(N, F)``; of large views also ``patches``, float16 ``(N, P, f)``,
            and which of them are ``inside`` the pictures, bool ``(N, P)``.
        """
        if self._encoder is None:
            raise ValueError("the bundle has no encoder")
        names = [POOLED, PATCHES] if len(views[0].pixels) >= LARGE else [POOLED]
        few = max(1, ENCODER_PIXELS // views[0].pixels[..., 0].size)
        rows = [
            self._encoder.run(
                ENCODER, {"images": np.stack([v.pixels for v in views[i : i + few]])}, names
            )
            for i in range(0, len(views), few)
        ]
        found = {POOLED: np.concatenate([row[POOLED] for row in rows])}
        if PATCHES in names:
            patches = np.concatenate([row[PATCHES] for row in rows]).astype(np.float16)
            found[PATCHES] = patches.reshape(len(views), -1, patches.shape[-1])
            found[INSIDE] = np.stack([view.seen.ravel() for view in views])
        return found

    def features(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Run the ``features`` graph on uint8 ``(N, H, W, C)``; empty if the bundle has none.

        Images are computed one by one, because matrix products in classifiers vary with the size of
        the batch; with a backend of fixed sizes, in padded batches.
        """
        self._check(images)
        if self._features is None:
            return {}
        step = MAX_ROWS if self._features.fixed_sizes else 1
        found = []
        for first in range(0, len(images), step):
            batch = images[first : first + step]
            spare = _bucket(len(batch)) - len(batch)
            padded = np.concatenate([batch, np.repeat(batch[-1:], spare, axis=0)])
            outputs = self._features.run(FEATURES, {"images": padded})
            found.append({name: values[: len(batch)] for name, values in outputs.items()})
        return {name: np.concatenate([batch[name] for batch in found]) for name in found[0]}

    def _draw(
        self, images: np.ndarray, digests: Sequence[bytes], draw: tuple[int, int, int]
    ) -> dict[str, np.ndarray]:
        """Return the inputs of ``score`` for one draw ``(image, seed, number)``."""
        i, seed, number = draw
        stream = NoiseStream(image_key(seed, digests[i], number))
        eps = self._eps(stream)  # before u: the order of the draws is part of every score
        return {"images": images[i], "u": stream.uniform(self.image_shape), **eps}

    def _verdicts(
        self,
        judges: Sequence[Calibration | None],
        images: np.ndarray,
        views: Sequence[View | None],
        draws: Sequence[tuple[int, int, int]],
        outputs: dict[str, np.ndarray],
    ) -> dict[int, Verdict]:
        """Judge the rows that are finite and hold the calibrated draw; returns verdicts by image.

        Each image is judged by its own calibration.
        """
        rows = [
            n
            for n, (i, *draw) in enumerate(draws)
            if judges[i] is not None and draw == [0, 0] and np.isfinite(outputs["parts"][n]).all()
        ]
        if not rows:
            return {}
        chosen = [draws[n][0] for n in rows]
        all_judges = {id(judge): judge for judge in judges if judge is not None}.values()
        statistics = self._statistics(
            images[chosen],
            {name: value[rows] for name, value in outputs.items()},
            any(judge.known is not None for judge in all_judges),
        )
        verdicts: dict[int, Verdict] = {}
        for judge in all_judges:
            mine = [n for n, i in enumerate(chosen) if judges[i] is judge]
            if not mine:
                continue
            own = {name: its[mine] for name, its in statistics.items()}
            seen = [view for n in mine if (view := views[chosen[n]]) is not None]
            if seen:
                own |= self.encoded(seen)
            finite = finite_rows(own)
            found = judge.verdicts({name: its[finite] for name, its in own.items()})
            verdicts |= zip(
                (chosen[n] for n, is_finite in zip(mine, finite, strict=True) if is_finite),
                found,
                strict=True,
            )
        return verdicts

    def _summarize(self, parts: np.ndarray) -> tuple[float, dict[str, float], float | None]:
        """Combine the parts of ``K`` draws, ``(K, P)``.

        Returns:
            Bits per dimension, their parts by name, and their standard error, see :class:`Score`.
        """
        names = part_names(self._levels)
        means = parts[0] if len(parts) == 1 else parts.mean(0)
        named = {"dequantization": 8.0, **dict(zip(names, means.tolist(), strict=True))}
        draws = 8.0 + parts.sum(1)
        if len(draws) == 1:
            return float(draws[0]), named, None
        nats_per_bpd = math.log(2.0) * math.prod(self.image_shape)
        log_weights = -draws * nats_per_bpd
        top = log_weights.max()
        weights = np.exp(log_weights - top)
        bpd = -(top + math.log(weights.mean())) / nats_per_bpd
        named["iwae_gap"] = float(bpd - draws.mean())
        # Delta method: the error of log(mean(w)) is the error of mean(w) divided by mean(w).
        error = weights.std(ddof=1) / (weights.mean() * math.sqrt(len(draws))) / nats_per_bpd
        return float(bpd), named, float(error)

    def _run(
        self,
        graph: str,
        count: int,
        inputs: Callable[[int], dict[str, np.ndarray]],
        wanted: Sequence[str] | None = None,
    ) -> dict[str, np.ndarray]:
        """Compute ``count`` rows of a graph: all its outputs, or only the ``wanted`` ones."""
        outputs = [batch for _, batch in self._batches(graph, count, inputs, wanted)]
        return {name: np.concatenate([o[name] for o in outputs]) for name in outputs[0]}

    def _batches(
        self,
        graph: str,
        count: int,
        inputs: Callable[[int], dict[str, np.ndarray]],
        wanted: Sequence[str] | None = None,
    ) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """Compute ``count`` rows in batches; yields the index of the first row and the outputs.

        Only backends with fixed sizes get padded batches, which repeat the last row.
        """
        for first in range(0, count, MAX_ROWS):
            rows = [inputs(i) for i in range(first, min(first + MAX_ROWS, count))]
            spare = _bucket(len(rows)) - len(rows) if self.backend.fixed_sizes else 0
            padded = rows + [rows[-1]] * spare
            batch = {
                name: np.stack([row[name] for row in padded])
                for name in inputs_of(graph, self._levels)
            }
            outputs = self.backend.run(graph, batch, wanted)
            yield first, {name: value[: len(rows)] for name, value in outputs.items()}

    def _check(self, images: np.ndarray) -> None:
        """Check what every graph takes; TorchScript would compute with other types, too."""
        if images.dtype != np.uint8 or images.shape[1:] != self.image_shape or not len(images):
            height, width, channels = self.image_shape
            raise ValueError(
                f"images must be uint8 (N, {height}, {width}, {channels}) with N at least 1, got "
                f"{images.dtype} {images.shape}"
            )

    def _shape(self, name: str) -> tuple[int, int, int]:
        return input_shape(name, self.image_shape, self.latent_shapes)

    def _eps(self, stream: NoiseStream) -> dict[str, np.ndarray]:
        """Draw the noise of the latents of one image, coarsest level first."""
        return {f"eps_{i}": stream.normal(shape) for i, shape in enumerate(self.latent_shapes)}

    def _y_eps(self, stream: NoiseStream, kind: str) -> np.ndarray:
        shape = self._shape("y_eps")
        return stream.normal(shape) if kind == "density" else np.zeros(shape, np.float32)


def _view(judge: Calibration, image: np.ndarray, resized: bool, view: View | None) -> View | None:
    """The view of an image that this calibration needs; ``None`` if it has no encoder.

    Raises:
        ValueError: it is missing, or has another size.
    """
    if judge.encoder is None:
        return None
    look = judge.look
    if view is None and not resized:
        return look.of(image)
    if view is None or len(view.pixels) != look.size:
        raise ValueError(
            f"the encoder needs a view of {look.size} pixels of the original of a resized image, "
            f"got {'none' if view is None else len(view.pixels)}"
        )
    return view


def _bucket(count: int) -> int:
    """The smallest of the fixed batch sizes that holds ``count`` rows."""
    return next(size for size in BUCKETS if size >= count)
