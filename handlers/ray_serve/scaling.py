"""How many replicas an operation needs, by the requests that its replicas and fronts have.

Ray counts calls, and a call carries up to a batch of requests. What waits in the fronts it does not
know: they send few requests at a time if answers take long.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from handlers.limits import MAX_BATCH

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

# What a replica reports, on average over the last moments.
REQUESTS = "requests"  # how many it has
WAITING = "waiting:"  # and the id of a front: how many wait there, as the replica was told last


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
