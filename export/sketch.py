"""What the networks of a bundle were trained on, as far as its manifest tells."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from serving.engine.bundle import Bundle
from training.datasets.sketch import KEY


def data_of_model(bundle: Bundle) -> list[Mapping[str, Any]]:
    """Describes the data set of a bundle's model, and those of the models it was started from."""
    records: list[Mapping[str, Any]] = [bundle.manifest["data"]]
    ancestors = [bundle.manifest.get("training") or {}]
    while ancestors:
        one = ancestors.pop()
        ancestors += filter(None, (one.get("started_from"), one.get("flow_from")))
        if "data" not in one or "splits" not in one:  # the model itself, or of an older version
            continue
        record = {key: one[key] for key in ("splits", KEY) if key in one} | {"name": one["data"]}
        # Of a version that kept no sketch, the same data set is known by that of a later model.
        if not any(record.items() <= known.items() for known in records):
            records.append(record)
    return records


def data_of_features(bundle: Bundle) -> Mapping[str, Any] | None:
    """Describes the data set of a bundle's network of features; ``None`` if unknown."""
    found: Mapping[str, Any] | None = (bundle.manifest.get("features") or {}).get("data")
    return found
