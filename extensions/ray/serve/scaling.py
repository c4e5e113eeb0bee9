"""How many replicas an operation needs, by the requests that its replicas and fronts have.

Ray counts calls, and a call carries up to a batch of requests. What waits in the fronts it does not
know: they send few requests at a time if answers take long.
"""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING, Any

from handlers.limits import MAX_BATCH

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

# What a replica reports, on average over the last moments.
REQUESTS = "requests"  # how many it has
WAITING = "waiting:"  # and the id of a front: how many wait there, as the replica was told last


class LastingQueue:
    """The requests that wait in a front, as far as they have done so at each of the last looks.

    A queue of a moment needs no further replica. But a replica that hears of it would report it
    until it hears of the next, which may be another's turn.

    Attributes:
        length: the smallest number at the last looks.
    """

    LOOKS = 3

    def __init__(self) -> None:
        self._last = deque([0] * self.LOOKS, self.LOOKS)
        self.length = 0

    def look(self, num_waiting: int) -> None:
        """Note how many requests wait."""
        self._last.append(num_waiting)
        self.length = min(self._last)


def by_requests(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """The number of replicas at which each has a batch of requests.

    Serve applies the least and the greatest number and the delays to it.
    """
    metrics = context.aggregated_metrics or {}
    num_requests = sum(metrics.get(REQUESTS, {}).values())
    for name, told in metrics.items():
        if name.startswith(WAITING):  # a front tells one replica now and another one then
            num_requests += max(told.values(), default=0.0)
    return max(1, math.ceil(num_requests / MAX_BATCH)), {}
