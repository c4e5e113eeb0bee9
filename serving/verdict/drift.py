"""Monitors whether the stream of images is still like the calibration images.

Each worker has one monitor per calibration.

For images like the calibration images, their p-values with ties broken at random are uniform on (0,
1), and ``z = Phi^-1(1 - p)`` of these is standard normal. (Ties broken by the picture would not do:
all copies of one that repeats would be at the same place.) Two one-sided cumulative sums (Page,
"Continuous inspection schemes", 1954) detect a shift of the mean within tens of images; the
Kolmogorov-Smirnov distance over a window detects other changes of the p-values.
docs/operations.md has thresholds with the expected time until a false alarm.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import NormalDist

ALLOWANCE = 0.5  # standard deviations: shifts of twice this are detected the fastest
WINDOW = 500  # images
MOST = 25.0  # limit of a sum, so that an alarm ends about fifty images after its cause

_normal = NormalDist()


class DriftMonitor:
    """Takes the p-value of one image after another, with ties broken at random.

    Attributes:
        images: number of images seen.
        unusual: the cumulative sum towards more unusual images, in standard deviations, from 0 to
            :data:`MOST`.
        usual: the same towards images that are less unusual than expected.
    """

    def __init__(self) -> None:
        self.images = 0
        self.unusual = 0.0
        self.usual = 0.0
        self._window: deque[float] = deque(maxlen=WINDOW)

    def update(self, uniform: float) -> None:
        """Take in one verdict."""
        tiny = 1e-12
        z = _normal.inv_cdf(min(max(1 - uniform, tiny), 1 - tiny))
        self.images += 1
        self.unusual = min(max(0.0, self.unusual + z - ALLOWANCE), MOST)
        self.usual = min(max(0.0, self.usual - z - ALLOWANCE), MOST)
        self._window.append(uniform)

    def distance(self) -> float:
        """``sqrt(n) sup |F_n(u) - u|`` over the last :data:`WINDOW` images; 0 before the first."""
        ordered = sorted(self._window)
        n = len(ordered)
        gap = max((max((i + 1) / n - u, u - i / n) for i, u in enumerate(ordered)), default=0.0)
        return math.sqrt(n) * gap
