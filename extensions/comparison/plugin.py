"""The paper's systems, trained and measured alike: ``ade compare``, and the data sets for it."""

from ade_base.extensions import DataSet, Extension, Verb

_DATASETS = "extensions.comparison.datasets"

EXTENSION = Extension(
    verbs={
        "compare": Verb(
            "train several systems under one budget, measure them alike, and write one report",
            "extensions.comparison.verbs.compare",
            "evaluate",
        ),
    },
    datasets={
        "stl10": DataSet(f"{_DATASETS}.stl10:load_stl10", 48, False),
        "imagenet64": DataSet(f"{_DATASETS}.imagenet64:load_imagenet64", 64, True),
        "lsun": DataSet(f"{_DATASETS}.lsun:load_lsun", 64, False),
    },
)
