"""Reports about a gate: ``ade gate`` and ``ade ood-bench``."""

from ade_base.extensions import Extension, Verb

EXTENSION = Extension(
    verbs={
        "gate": Verb(
            "forecast a gate's alarms per day",
            "extensions.gate_reports.verbs.gate",
            "calibrate",
        ),
        "ood-bench": Verb(
            "measure how well a bundle's verdict detects out-of-distribution images",
            "extensions.gate_reports.verbs.ood_bench",
            "fit",
        ),
    }
)
