"""The four verbs on NumPy arrays. Knows bundles and graphs, nothing of HTTP.

Every answer is a function of its own image and seed: noise comes from :mod:`serving.engine.noise`,
and no result depends on its neighbours or on how many they are.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from serving.engine.backends import Backend, OnnxRuntimeBackend, load_backend
from serving.engine.bundle import CALIBRATION_NAME, FEATURES_NAME, Bundle, open_bundle
from serving.engine.noise import NoiseStream, image_digest, image_key, sample_key, tie_breaker
from serving.engine.signatures import OPERATIONS, input_shape, inputs_of
from serving.verdict.calibration import Calibration, Calibrations, Verdict
from serving.verdict.semantic import DISTANCE, ENERGY, FEATURES
from serving.verdict.statistics import (
    compute_statistics,
    finite_rows,
    part_names,
    statistic_names,
)

MAX_BATCH = 32  # more at once is not faster (docs/performance.md)
BUCKETS = (1, 2, 4, 8, 16, 32)  # the batch sizes of a backend that wants fixed ones


@dataclass(frozen=True)
class EncodedLevel:
    """Latents of one level for ``N`` images; each float32 ``(N, c, h, w)``.

    ``eps`` is ``z`` standardised by its prior given the coarser levels, the noise that samples it,
    if asked for.
    """

    mean: np.ndarray
    log_scale: np.ndarray
    z: np.ndarray
    eps: np.ndarray | None = None


@dataclass(frozen=True)
class Score:
    """What is known of one image's likelihood.

    Attributes:
        bpd: bits per dimension, a bound; lower is likelier.
        parts: they sum to ``bpd``, by name.
        standard_error: of ``bpd`` over its ``K`` draws; ``None`` for one draw.
        bits: of each pixel, float64 ``(H, W)``; they sum to ``bpd`` times the image's values.
            ``None`` unless asked for.
        verdict: by the calibrated estimator; ``None`` without a calibration for the way that the
            image came.
    """

    bpd: float
    parts: dict[str, float]
    standard_error: float | None
    verdict: Verdict | None
    bits: np.ndarray | None = None


class NotFinite(ArithmeticError):
    """The model gave a number that is not finite for an image."""


class InferenceEngine:
    """Sampling, encoding, reconstruction and scoring with one bundle.

    Args:
        bundle: opened, or the path of one.
        backend: ``onnxruntime`` or ``torchscript``.
        device: ``auto``, ``cpu`` or ``cuda``.
        operations: which of the four to load, of those that the bundle has; all unless told.
        gpu: which, of several.
        cuda_graphs: see :func:`serving.engine.backends.load_backend`.

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
        graphs = self.bundle.graphs(operations)
        self.backend: Backend = load_backend(self.bundle, graphs, backend, device, gpu, cuda_graphs)
        self._features: Backend | None = None
        if self.bundle.has(FEATURES_NAME) and "score" in operations:
            self._features = OnnxRuntimeBackend(
                self.bundle,
                [FEATURES],
                device if backend == "onnxruntime" else "cpu",
                gpu,
                cuda_graphs,
            )
        self.calibrations = Calibrations()
        if self.bundle.has(CALIBRATION_NAME):
            self.calibrations = Calibrations.load(self.bundle.file(CALIBRATION_NAME))
            for calibration in filter(None, (self.calibrations.exact, self.calibrations.resized)):
                calibration.check_statistics(
                    [
                        *statistic_names(self.bundle.image_shape, self.bundle.latent_shapes),
                        *((DISTANCE, ENERGY) if self.bundle.has(FEATURES_NAME) else ()),
                    ]
                )
        self.image_shape = self.bundle.image_shape
        self.latent_shapes = self.bundle.latent_shapes
        self._levels = len(self.latent_shapes)
        self._graphs = graphs

    @property
    def calibration(self) -> Calibration | None:
        """Of images of the model's size."""
        return self.calibrations.exact

    def warm_up(self) -> None:
        """Run every loaded graph at every batch size once, so that no request is the first."""
        for graph in self._graphs:
            for bucket in BUCKETS if self.backend.fixed_sizes else (1, MAX_BATCH):
                self.backend.run(
                    graph,
                    {
                        name: np.zeros(
                            (bucket, *self._shape(name)),
                            np.uint8 if name == "images" else np.float32,
                        )
                        for name in inputs_of(graph, self._levels)
                    },
                )
        for size in BUCKETS if self._features is not None and self._features.fixed_sizes else (1,):
            self.features(np.zeros((size, *self.image_shape), np.uint8))

    def sample(
        self,
        seeds: Sequence[int],
        indices: Sequence[int],
        kinds: Sequence[str] | None = None,
        temperatures: Sequence[float] | None = None,
    ) -> np.ndarray:
        """New images, each a function of its seed, index, kind and temperature alone.

        Args:
            seeds: one an image.
            indices: one an image.
            kinds: ``mean`` (the default) or ``density``, one an image.
            temperatures: multiply the prior's standard deviations, one an image; 1 unless given.

        Returns:
            uint8 ``(N, H, W, C)``.
        """
        kinds = kinds or ["mean"] * len(seeds)
        temperatures = temperatures or [1.0] * len(seeds)

        def noise(i: int) -> dict[str, np.ndarray]:
            stream = NoiseStream(sample_key(seeds[i], indices[i]))
            eps = {
                name: stream.normal(shape) * np.float32(temperatures[i])
                for name, shape in self._eps()
            }
            return {**eps, "y_eps": self._y_eps(stream, kinds[i])}

        return self._run("sample", len(seeds), noise)["images"]

    def decode(
        self, z: Sequence[np.ndarray], seeds: Sequence[int], kinds: Sequence[str] | None = None
    ) -> np.ndarray:
        """The images of given latents.

        Args:
            z: one array a level, coarsest first, float32 ``(N, c, h, w)``.
            seeds: one an image, for density images.
            kinds: as for :meth:`sample`.

        Returns:
            uint8 ``(N, H, W, C)``.
        """
        return self._images_of("decode", "z", z, seeds, kinds)

    def sample_with(
        self, eps: Sequence[np.ndarray], seeds: Sequence[int], kinds: Sequence[str] | None = None
    ) -> np.ndarray:
        """The images of given noise; mean images are as :meth:`sample` makes them of noise that it
        draws.

        Args:
            eps: one array a level, coarsest first, float32 ``(N, c, h, w)``; what a level makes of
                its noise depends on the coarser levels, and noise of zeros is the mean that those
                lead to expect.
            seeds: one an image, for density images.
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
        """What a graph makes of one array a level, the inputs ``NAME_LEVEL``."""
        kinds = kinds or ["mean"] * len(seeds)

        def inputs(i: int) -> dict[str, np.ndarray]:
            arrays = {
                f"{name}_{level}": np.asarray(given[level][i], np.float32)
                for level in range(self._levels)
            }
            return {**arrays, "y_eps": self._y_eps(NoiseStream(sample_key(seeds[i], i)), kinds[i])}

        return self._run(graph, len(seeds), inputs)["images"]

    def encode(
        self,
        images: np.ndarray,
        seeds: Sequence[int] | None = None,
        eps: Sequence[bool] | None = None,
    ) -> list[EncodedLevel]:
        """Posterior means, log-scales and one draw of the latents, level by level, coarsest first.

        Args:
            images: uint8 ``(N, H, W, C)``.
            seeds: one an image; 0 unless given.
            eps: whether each image's draw is wanted as noise too; no unless given. Of the others it
                is zeros.
        """
        seeds = seeds or [0] * len(images)

        def inputs(i: int) -> dict[str, np.ndarray]:
            stream = NoiseStream(image_key(seeds[i], image_digest(images[i])))
            return {
                "images": images[i],
                **{name: stream.normal(shape) for name, shape in self._eps()},
            }

        out = self._run("encode", len(images), inputs)
        levels = [
            EncodedLevel(out[f"mean_{i}"], out[f"log_scale_{i}"], out[f"z_{i}"])
            for i in range(self._levels)
        ]
        rows = [i for i, wanted in enumerate(eps or []) if wanted]
        if not rows:
            return levels
        middle = np.full(
            self.image_shape, 0.5, np.float32
        )  # of each pixel's interval, where encode has it
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
        seeds = seeds or [0] * len(images)
        kinds = kinds or ["mean"] * len(images)

        def inputs(i: int) -> dict[str, np.ndarray]:
            stream = NoiseStream(image_key(seeds[i], image_digest(images[i])))
            eps = {name: stream.normal(shape) for name, shape in self._eps()}
            return {"images": images[i], **eps, "y_eps": self._y_eps(stream, kinds[i])}

        return self._run("reconstruct", len(images), inputs)["reconstruction"]

    def score(
        self,
        images: np.ndarray,
        seeds: Sequence[int] | None = None,
        samples: Sequence[int] | None = None,
        maps: Sequence[bool] | None = None,
        resized: Sequence[bool] | None = None,
    ) -> list[Score | NotFinite]:
        """Bits per dimension of each image, its parts, the verdict, and where the bits lie.

        Args:
            images: uint8 ``(N, H, W, C)``.
            seeds: one an image; 0 unless given. The verdict always uses seed 0, as the calibration
                did.
            samples: K an image, 1 unless given: 1 is the ELBO, more the importance-weighted bound.
            maps: whether each image gets its bits pixel by pixel, the mean over its draws; no
                unless given.
            resized: whether each image was resized to the model's size, which another calibration
                judges; no unless given.

        Returns:
            One an image; an image whose likelihood is not finite gets the error in its place.
        """
        seeds = seeds or [0] * len(images)
        samples = samples or [1] * len(images)
        judges = [self.calibrations.of(its) for its in resized or [False] * len(images)]
        digests = [image_digest(image) for image in images]
        # The verdict needs draw 0 of seed 0: a draw of its own where another seed was asked for.
        plan = [(i, seeds[i], k) for i in range(len(images)) for k in range(samples[i])]
        extra = [(i, 0, 0) for i in range(len(images)) if seeds[i] != 0 and judges[i] is not None]
        draws = plan + extra
        parts: list[np.ndarray] = []
        bits: dict[int, np.ndarray] = {}
        verdicts: dict[int, Verdict] = {}
        wanted = ["parts"] if not any(judges) and not (maps and any(maps)) else None
        inputs = lambda row: self._draw(images, digests, draws[row])
        for first, outputs in self._batches("score", len(draws), inputs, wanted):
            rows = draws[first : first + len(outputs["parts"])]
            parts.append(outputs["parts"].astype(np.float64))
            verdicts |= self._verdicts(judges, images, digests, rows, outputs)
            for n, (i, _, _) in enumerate(rows):
                if maps and maps[i] and first + n < len(plan):
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
                results.append(
                    NotFinite("the model's likelihood of this image is not a finite number")
                )
                continue
            score = self._summarize(mine, verdicts.get(i))
            if i in bits:
                # What is no pixel's own (the constant of dequantisation, the bound's gap, the
                # rounding of sums) is divided evenly.
                rest = score.bpd * math.prod(self.image_shape) - bits[i].sum()
                score = dataclasses.replace(score, bits=bits[i] + rest / bits[i].size)
            results.append(score)
        return results

    def statistics(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """What verdicts are made of, float32 ``(N,)`` by name; of the draw that verdicts use.

        Args:
            images: uint8 ``(N, H, W, C)``.
        """
        digests = [image_digest(image) for image in images]
        found = [
            self._statistics(images[first : first + len(outputs["parts"])], outputs)
            for first, outputs in self._batches(
                "score", len(images), lambda i: self._draw(images, digests, (i, 0, 0))
            )
        ]
        return {name: np.concatenate([batch[name] for batch in found]) for name in found[0]}

    def _statistics(
        self, images: np.ndarray, outputs: dict[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        return compute_statistics(images, {**outputs, **self.features(images)})

    def features(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """What the ``features`` graph gives for uint8 ``(N, H, W, C)``; nothing if there is none.

        Image by image, because the products of matrices in classifiers vary with the batch's size;
        but where the backend wants fixed sizes, a padded batch at a time.
        """
        if self._features is None:
            return {}
        step = MAX_BATCH if self._features.fixed_sizes else 1
        found = []
        for first in range(0, len(images), step):
            batch = images[first : first + step]
            size = next(b for b in BUCKETS if b >= len(batch))
            padded = np.concatenate([batch, np.repeat(batch[-1:], size - len(batch), axis=0)])
            outputs = self._features.run(FEATURES, {"images": padded})
            found.append({name: values[: len(batch)] for name, values in outputs.items()})
        return {name: np.concatenate([batch[name] for batch in found]) for name in found[0]}

    def _draw(
        self, images: np.ndarray, digests: Sequence[bytes], draw: tuple[int, int, int]
    ) -> dict[str, np.ndarray]:
        """Inputs of ``score`` for one draw ``(image, seed, number)``."""
        i, seed, number = draw
        stream = NoiseStream(image_key(seed, digests[i], number))
        eps = {name: stream.normal(shape) for name, shape in self._eps()}
        return {"images": images[i], "u": stream.uniform(self.image_shape), **eps}

    def _verdicts(
        self,
        judges: Sequence[Calibration | None],
        images: np.ndarray,
        digests: Sequence[bytes],
        draws: Sequence[tuple[int, int, int]],
        outputs: dict[str, np.ndarray],
    ) -> dict[int, Verdict]:
        """Verdicts by image, of those rows that are the calibrated draw and finite, each by its
        image's calibration.
        """
        rows = [
            n
            for n, (i, *draw) in enumerate(draws)
            if judges[i] is not None and draw == [0, 0] and np.isfinite(outputs["parts"][n]).all()
        ]
        if not rows:
            return {}
        chosen = [draws[n][0] for n in rows]
        statistics = self._statistics(
            images[chosen], {name: value[rows] for name, value in outputs.items()}
        )
        finite = finite_rows(statistics)
        verdicts: dict[int, Verdict] = {}
        for judge in {id(judge): judge for judge in judges if judge is not None}.values():
            mine = [n for n, i in enumerate(chosen) if judges[i] is judge and finite[n]]
            if mine:
                ties = [tie_breaker(digests[chosen[n]]) for n in mine]
                verdicts |= zip(
                    (chosen[n] for n in mine),
                    judge.verdicts(
                        {name: values[mine] for name, values in statistics.items()}, ties
                    ),
                    strict=True,
                )
        return verdicts

    def _summarize(self, parts: np.ndarray, verdict: Verdict | None) -> Score:
        """From the parts of ``K`` draws, ``(K, P)``, to one score."""
        named = {"dequantization": 8.0}
        named |= {
            name: float(value)
            for name, value in zip(part_names(self._levels), parts.mean(0), strict=True)
        }
        draws = 8.0 + parts.sum(1)
        if len(draws) == 1:
            return Score(float(draws[0]), named, None, verdict)
        nats_per_bit = math.log(2.0) * math.prod(self.image_shape)
        log_weights = -draws * nats_per_bit
        top = log_weights.max()
        weights = np.exp(log_weights - top)
        bpd = -(top + math.log(weights.mean())) / nats_per_bit
        named["iwae_gap"] = float(bpd - draws.mean())
        # Delta method: the error of log(mean w) is that of the mean over the mean.
        error = weights.std(ddof=1) / (weights.mean() * math.sqrt(len(draws))) / nats_per_bit
        return Score(float(bpd), named, float(error), verdict)

    def _run(
        self,
        graph: str,
        count: int,
        inputs: Callable[[int], dict[str, np.ndarray]],
        wanted: Sequence[str] | None = None,
    ) -> dict[str, np.ndarray]:
        """Compute ``count`` rows of a graph: its outputs, or those that are wanted."""
        outputs = [batch for _, batch in self._batches(graph, count, inputs, wanted)]
        return {name: np.concatenate([o[name] for o in outputs]) for name in outputs[0]}

    def _batches(
        self,
        graph: str,
        count: int,
        inputs: Callable[[int], dict[str, np.ndarray]],
        wanted: Sequence[str] | None = None,
    ) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """Compute ``count`` rows batch by batch; before each its first number.

        Where the backend wants fixed sizes, a batch is padded with its last row: elsewhere that
            would be lost time.
        """
        for first in range(0, count, MAX_BATCH):
            rows = [inputs(i) for i in range(first, min(first + MAX_BATCH, count))]
            size = (
                next(b for b in BUCKETS if b >= len(rows))
                if self.backend.fixed_sizes
                else len(rows)
            )
            padded = rows + [rows[-1]] * (size - len(rows))
            batch = {
                name: np.stack([row[name] for row in padded])
                for name in inputs_of(graph, self._levels)
            }
            yield (
                first,
                {
                    name: value[: len(rows)]
                    for name, value in self.backend.run(graph, batch, wanted).items()
                },
            )

    def _shape(self, name: str) -> tuple[int, int, int]:
        return input_shape(name, self.image_shape, self.latent_shapes)

    def _eps(self) -> list[tuple[str, tuple[int, int, int]]]:
        return [(f"eps_{i}", shape) for i, shape in enumerate(self.latent_shapes)]

    def _y_eps(self, stream: NoiseStream, kind: str) -> np.ndarray:
        shape = self._shape("y_eps")
        return stream.normal(shape) if kind == "density" else np.zeros(shape, np.float32)
