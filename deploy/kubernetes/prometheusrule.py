"""Print the alarms of ``deploy/prometheus/*-rules.yml`` as a PrometheusRule.

python deploy/kubernetes/prometheusrule.py > deploy/kubernetes/monitoring/prometheusrule.yaml
"""

from __future__ import annotations

from pathlib import Path

RULES = Path(__file__).parents[1] / "prometheus"
HEAD = """\
# Made from deploy/prometheus/*-rules.yml by deploy/kubernetes/prometheusrule.py.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: ade
  labels:
    release: kube-prometheus-stack
spec:
  groups:
"""


def manifest() -> str:
    """The manifest, with the comments that stand between the rules."""
    groups = [
        path.read_text().partition("\ngroups:\n")[2] for path in sorted(RULES.glob("*-rules.yml"))
    ]
    lines = "".join(groups).splitlines()
    return HEAD + "".join(f"  {line}\n" if line else "\n" for line in lines)


if __name__ == "__main__":
    print(manifest(), end="")
