"""The operations by their names."""

from __future__ import annotations

from typing import Any

from serving.api.operations.base import Operation
from serving.api.operations.encode import Encode
from serving.api.operations.reconstruct import Reconstruct
from serving.api.operations.sample import Sample
from serving.api.operations.score import Score

OPERATIONS: dict[str, Operation[Any, Any, Any]] = {
    operation.name: operation for operation in (Sample(), Encode(), Reconstruct(), Score())
}
