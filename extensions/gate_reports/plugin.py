"""``ade ood-bench``, the report about a gate."""

from ade_base.extensions import Extension, Verb

EXTENSION = Extension(
    verbs={
        "ood-bench": Verb(
            "measure how well a bundle's verdict detects out-of-distribution images",
            "extensions.gate_reports.verbs.ood_bench",
            "fit",
        ),
    }
)
