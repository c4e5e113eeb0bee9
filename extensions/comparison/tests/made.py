"""Made-up rows of a comparison."""

import dataclasses

from extensions.comparison.rows import Measured, Row
from training.recipes import recipe


def run(system, seed=0, images=400_000, changes=(), **fields):
    """A row of a run that was measured on nine images."""
    changes = dict(changes)
    size, pixels = changes.pop("size", "tiny"), changes.pop("pixels", 32)
    measured = Measured("step-1", {"samples": 10, "resnet20": "one"}, "test[0:9]", 9)
    measured = dataclasses.replace(measured, **changes.pop("measured", {}))
    row = Row(
        name="a",
        run=None,
        config=dataclasses.replace(recipe(system, pixels, 3, size), **changes),
        data="cifar10",
        source=None,
        seed=seed,
        images_budget=images,
        images=images,
        measured=measured,
    )
    return dataclasses.replace(row, **fields)
