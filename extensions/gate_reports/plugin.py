"""Reports about a gate: ``ade gate`` and ``ade ood-bench``."""

from ade_base.extensions import Extension, Verb

EXTENSION = Extension(
    verbs={
        "gate": Verb(
            "forecast a gate's alarms per day, or give it feedback on images",
            "ade_cli.gate",
            "calibrate",
        ),
        "ood-bench": Verb(
            "measure how well a bundle's verdict detects out-of-distribution images",
            "ade_cli.ood_bench",
            "fit",
        ),
    }
)
