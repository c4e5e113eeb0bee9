"""The paper's systems, trained and measured alike: ``ade compare``."""

from ade_base.extensions import Extension, Verb

EXTENSION = Extension(
    verbs={
        "compare": Verb(
            "train several systems under one budget, measure them alike, and write one report",
            "extensions.comparison.verbs.compare",
            "evaluate",
        ),
    }
)
