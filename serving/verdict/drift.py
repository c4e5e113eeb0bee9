"""Is the stream of images still like the calibration's? Running statistics of the verdicts, one
monitor a worker.

Of images like the calibration's, ``Verdict.uniform`` is uniform on (0, 1) and ``z = Phi^-1(1 -
uniform)`` standard normal. Two one-sided cumulative sums (Page, "Continuous inspection schemes",
1954) tell a shift of their mean, within tens of images; the distance of Kolmogorov and Smirnov over
a window tells any other change. docs/ood.md has thresholds by how long a stream without a change
goes on until it crosses them.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import NormalDist

ALLOWANCE = 0.5  # standard deviations: shifts of twice this are told the quickest
WINDOW = 500  # images
MOST = 25.0  # of a sum: once the stream is as before, it is back below any threshold after some fifty images

_normal = NormalDist()


class DriftMonitor:
    """Fed with ``Verdict.uniform`` of image after image.

    Attributes:
        images: how many it has seen.
        strange: the cumulative sum towards stranger images, in standard deviations, from 0 to
            :data:`MOST`.
        usual: the same towards images that are more usual than they should be.
    """

    def __init__(self) -> None:
        self.images = 0
        self.strange = 0.0
        self.usual = 0.0
        self._window: deque[float] = deque(maxlen=WINDOW)

    def update(self, uniform: float) -> None:
        """Take in one verdict."""
        tiny = 1e-12
        z = _normal.inv_cdf(min(max(1 - uniform, tiny), 1 - tiny))
        self.images += 1
        self.strange = min(max(0.0, self.strange + z - ALLOWANCE), MOST)
        self.usual = min(max(0.0, self.usual - z - ALLOWANCE), MOST)
        self._window.append(uniform)

    def distance(self) -> float:
        """``sqrt(n) sup |F_n(u) - u|`` over the last images, at most :data:`WINDOW`; 0 before the
        first.
        """
        ordered = sorted(self._window)
        n = len(ordered)
        gap = max((max((i + 1) / n - u, u - i / n) for i, u in enumerate(ordered)), default=0.0)
        return math.sqrt(n) * gap
