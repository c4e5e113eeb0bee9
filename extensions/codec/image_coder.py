"""One image on a stack of bits, with every part of the model.

Encoding (the decoder does the inverse of each step, in the opposite order):

1. Dequantisation: pop a place within each pixel's bin, uniformly or as the model expects it.
2. Flow: layer by layer, on integers; where it stretches a value, pop, where it shrinks, push.
3. Latents: pop each level from its posterior, coarsest first.
4. Push ``y`` by ``p(y | z)``.
5. Push the latents by their priors, finest first.

What is pushed less what is popped is the negative log-weight of the draw that the popped bits
made, so its mean is the ELBO that ``ade score`` estimates.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from extensions.codec.lattice import check_range, shrink, stretch
from extensions.codec.networks import Networks
from extensions.codec.stack import Stack


class ImageCoder:
    """Encodes and decodes single images, uint8 ``(H, W, C)``."""

    def __init__(self, networks: Networks) -> None:
        self._networks = networks
        self._unit = 2.0**networks.grid_bits
        self._latent_unit = 2.0**networks.latent_bits

    def encode(self, pixels: np.ndarray, stack: Stack) -> None:
        """Push one image.

        Raises:
            NotCoded: the model cannot code it. The stack is then in no defined state.
        """
        y = self._networks.bins.enter(np.ascontiguousarray(pixels.transpose(2, 0, 1)), stack)
        y = self._through(self._networks.flow, y, stack)
        check_range(y)
        if not self._networks.levels:
            stack.push_gaussian(y.ravel(), np.zeros(y.size), np.full(y.size, self._unit))
            return
        decoder = _TopDown(self._networks)
        encoded = self._encode_maps(y)
        drawn: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for level in range(self._networks.levels):
            prior = self._latent_gaussian(decoder.prior)
            z = stack.draw_gaussian(*self._latent_gaussian(decoder.posterior(encoded[level])))
            drawn.append((z, *prior))
            decoder.advance(self._latents(z, level))
        stack.push_gaussian(y.ravel(), *self._y_gaussian(decoder.y_mean))
        for z, mean, scale in reversed(drawn):
            stack.push_gaussian(z, mean, scale)

    def decode(self, stack: Stack) -> np.ndarray:
        """Pop the image that was pushed last.

        Raises:
            Damaged, NotCoded: there is none.
        """
        height, width, channels = self._networks.image_shape
        shape = (channels, height, width)
        if self._networks.levels:
            y = self._decode_y(stack, shape)
        else:
            size = channels * height * width
            y = stack.pop_gaussian(np.zeros(size), np.full(size, self._unit)).reshape(shape)
        y = self._through(self._networks.flow, y, stack, back=True)
        return self._networks.bins.leave(y, stack).transpose(1, 2, 0)

    def _decode_y(self, stack: Stack, shape: tuple[int, int, int]) -> np.ndarray:
        decoder = _TopDown(self._networks)
        states: list[tuple[np.ndarray, dict[str, np.ndarray]]] = []
        for level in range(self._networks.levels):
            z = stack.pop_gaussian(*self._latent_gaussian(decoder.prior))
            states.append((z, decoder.state))
            decoder.advance(self._latents(z, level))
        y = stack.pop_gaussian(*self._y_gaussian(decoder.y_mean)).reshape(shape)
        check_range(y)
        encoded = self._encode_maps(y)
        for level in reversed(range(self._networks.levels)):
            z, state = states[level]
            decoder.level, decoder.state = level, state
            stack.undraw_gaussian(z, *self._latent_gaussian(decoder.posterior(encoded[level])))
        return y

    def _through(
        self, steps: Sequence[dict[str, Any]], x: np.ndarray, stack: Stack, back: bool = False
    ) -> np.ndarray:
        """Apply steps of the flow or, with ``back``, undo them, the last first."""
        for step in reversed(steps) if back else steps:
            match step["do"]:
                case "rotate":
                    rotation = self._networks.rotations[step["rotation"]]
                    x = rotation.inverse(x) if back else rotation.forward(x)
                case "couple":
                    x = self._couple(step, x, stack, shrink if back else stretch)
                case "squeezed":
                    x = _unsqueeze(self._through(step["steps"], _squeeze(x), stack, back))
                case _:
                    half = x.shape[0] // 2
                    inner = self._through(step["steps"], x[:half], stack, back)
                    x = np.concatenate([inner, x[half:]])
        return x

    def _couple(self, step: dict[str, Any], x: np.ndarray, stack: Stack, change: Any) -> np.ndarray:
        """A coupling layer, with ``change`` one of :func:`stretch` and :func:`shrink`."""
        first = step["first_pixel_kept"]
        if first is None:  # by channels
            kept = len(x) // 2
            places: slice | np.ndarray = slice(kept * x[0].size, None)
            seen = x[:kept]
        else:
            places = _changed(x.shape, first)
            seen = x.copy()
            seen.ravel()[places] = 0
        log_scale, shift = self._networks.run(step["graph"], {"kept": self._floats(seen)})
        if first is not None:
            log_scale, shift = log_scale.ravel()[places], shift.ravel()[places]
        shifts = np.minimum(np.maximum(shift.ravel().astype(np.float64), -(2**10)), 2**10)
        result = x.ravel().copy()
        result[places] = change(
            result[places],
            log_scale.ravel().astype(np.float64),
            np.rint(shifts * self._unit).astype(np.int64),
            stack,
        )
        return result.reshape(x.shape)

    def _floats(self, values: np.ndarray) -> np.ndarray:
        floats: np.ndarray = (values / self._unit).astype(np.float32)[None]
        return floats

    def _encode_maps(self, y: np.ndarray) -> list[np.ndarray]:
        """The map that each level sees; the groups of a resolution see the same one."""
        maps = self._networks.run("codec-encoder", {"y": self._floats(y)})
        groups = self._networks.levels // len(maps)
        return [m for m in maps for _ in range(groups)]

    def _latents(self, z: np.ndarray, level: int) -> np.ndarray:
        shape = self._networks.latent_shapes[level]
        return (z / self._latent_unit).astype(np.float32).reshape(1, *shape)

    def _latent_gaussian(
        self, gaussian: tuple[np.ndarray, np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        return _on_grid(*gaussian, self._latent_unit)

    def _y_gaussian(self, mean: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return _on_grid(mean, self._networks.arrays["log_sigma"], self._unit)


class _TopDown:
    """The decoder's way from coarse to fine, as far as latents are known.

    Attributes:
        level: whose latents come next.
        state: features and prior of that level.
        y_mean: of ``p(y | z)``, once all latents are known.
    """

    def __init__(self, networks: Networks) -> None:
        self._networks = networks
        self.level = 0
        names = ("features", "prior_mean", "prior_log_scale")
        self.state = {name: networks.arrays[name] for name in names}
        self.y_mean = np.zeros(0, np.float32)

    @property
    def prior(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and log-scale."""
        return self.state["prior_mean"], self.state["prior_log_scale"]

    def posterior(self, encoded: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and log-scale."""
        graph = f"codec-posterior-{self.level}"
        mean, log_scale = self._networks.run(graph, {**self.state, "encoded": encoded})
        return mean, log_scale

    def advance(self, z: np.ndarray) -> None:
        """Enter the latents of this level."""
        self.level += 1
        results = self._networks.run(
            f"codec-stage-{self.level}", {"features": self.state["features"], "z": z}
        )
        if self.level == self._networks.levels:
            (self.y_mean,) = results
        else:
            self.state = dict(
                zip(("features", "prior_mean", "prior_log_scale"), results, strict=True)
            )


def _on_grid(mean: np.ndarray, log_scale: np.ndarray, unit: float) -> tuple[np.ndarray, np.ndarray]:
    means = mean.ravel().astype(np.float64) * unit
    scales = np.exp(np.clip(log_scale.ravel().astype(np.float64), -30.0, 30.0)) * unit
    return means, scales


@lru_cache(maxsize=16)
def _changed(shape: tuple[int, int, int], first_pixel_kept: int) -> np.ndarray:
    """The places that a checkerboard coupling changes, in the flat image."""
    rows, columns = np.indices(shape[1:])
    changed = np.broadcast_to((rows + columns + first_pixel_kept) % 2 == 0, shape)
    return np.flatnonzero(changed)


def _squeeze(x: np.ndarray) -> np.ndarray:
    """Each 2x2 patch as channels, in the order of :class:`ade_model.bijections.Squeeze`."""
    c, h, w = x.shape
    patches = x.reshape(c, h // 2, 2, w // 2, 2).transpose(0, 2, 4, 1, 3)
    return np.ascontiguousarray(patches).reshape(4 * c, h // 2, w // 2)


def _unsqueeze(x: np.ndarray) -> np.ndarray:
    c, h, w = x.shape[0] // 4, x.shape[1], x.shape[2]
    pixels = x.reshape(c, 2, 2, h, w).transpose(0, 3, 1, 4, 2)
    return np.ascontiguousarray(pixels).reshape(c, 2 * h, 2 * w)
