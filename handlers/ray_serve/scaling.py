"""How many replicas an operation needs, by the requests that its replicas have.

Ray counts calls, and a call carries up to a batch of requests.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from handlers.limits import MAX_BATCH

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

REQUESTS = "requests"  # what a replica reports: how many it has, on average over the last moments


def by_requests(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """The number of replicas at which each has a batch of requests.

    Serve applies the least and the greatest number and the delays to it.
    """
    of_replicas = (context.aggregated_metrics or {}).get(REQUESTS, {})
    return max(1, math.ceil(sum(of_replicas.values()) / MAX_BATCH)), {}
