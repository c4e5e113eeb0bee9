"""The paper's systems, trained and measured alike: ``ade compare``, and STL-10 for it."""

from ade_base.extensions import DataSet, Extension, Verb

EXTENSION = Extension(
    verbs={
        "compare": Verb(
            "train several systems under one budget, measure them alike, and write one report",
            "extensions.comparison.verbs.compare",
            "evaluate",
        ),
    },
    datasets={"stl10": DataSet("extensions.comparison.datasets.stl10:load_stl10", 48, False)},
)
