"""The metrics, the logs and the dashboard."""

import errno
import fcntl
import json
import re
import shutil

import pytest

from ade_base.brand import NAME, STYLE
from ade_base.files import LOCK
from ade_base.ports import VARIABLES, free_ports
from handlers.front.exposition import REFUSALS, START
from handlers.launch.serve import _alone_with_logs
from handlers.service.metrics import QUEUE_SECONDS
from serving.api.journal import Journal, last_errors
from serving.api.telemetry import FAMILIES, METRICS, Stopwatch
from tests.helpers import ROOT, WORKER_LABELS, held_by_another
from tests.service import error_of_serve


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_metric_has_a_help_text(family):
    assert family.about.endswith(".")


def test_a_stopwatch_adds_up_and_survives_errors():
    watch = Stopwatch()
    for _ in range(2):
        with pytest.raises(ValueError), watch("decode"):
            raise ValueError
    assert watch.seconds["decode"] > 0 and watch.seconds["compute"] == 0


def test_a_folder_of_logs_that_was_removed_is_made_again(tmp_path):
    """By the worker that takes the place of one that ended."""
    folder = tmp_path / "kept" / "logs"
    Journal(folder, "score-0")
    shutil.rmtree(folder.parent)
    Journal(folder, "score-0").write([{"status": 500, "code": "internal_error"}])
    assert [entry["status"] for entry in last_errors(folder)] == [500]


def test_a_journal_that_cannot_be_opened_keeps_no_worker_from_starting(tmp_path):
    folder = tmp_path / "file" / "logs"
    folder.parent.touch()
    journal = Journal(folder, "score-0")
    journal.write([{"status": 200}])
    folder.parent.unlink()
    folder.mkdir(parents=True)
    journal.write([{"status": 500, "code": "internal_error"}])
    assert [entry["status"] for entry in last_errors(folder)] == [500]


def test_journals_keep_errors_findable(tmp_path):
    first, second = Journal(tmp_path, "score-9001"), Journal(tmp_path, "score-9002")
    for i in range(4):
        first.write([{"operation": "score", "id": f"a{i}", "status": 200}] * 2)
        (first, second)[i % 2].write(
            [
                {
                    "operation": "score",
                    "id": f"b{i}",
                    "status": 415,
                    "code": "not_an_image",
                    "message": "not an image\nat all",
                }
            ]
        )
    with open(tmp_path / "score-9001.requests.jsonl", "a") as out:
        out.write('{"time": "2999", "code"')  # being written
    assert [entry["id"] for entry in last_errors(tmp_path, 3)] == ["b1", "b2", "b3"]
    lines = (tmp_path / "score-9002.requests.jsonl").read_text().splitlines()
    assert len(lines) == 2 and all(
        json.loads(line)["message"] == "not an image\nat all" for line in lines
    )


def test_journals_are_rotated(tmp_path, monkeypatch):
    monkeypatch.setattr("serving.api.journal.MAX_BYTES", 1000)
    journal = Journal(tmp_path, "score-9001")
    for _ in range(100):
        journal.write([{"status": 200}])
    files = sorted(file.name for file in tmp_path.iterdir())
    assert files == [f"score-9001.requests.jsonl{end}" for end in ("", ".1", ".2")]
    assert all(0 < file.stat().st_size <= 1000 for file in tmp_path.iterdir())


def test_two_services_have_two_folders_for_logs(tmp_path):
    """Each would rotate and delete the files of the other."""
    ports = zip(VARIABLES.values(), free_ports(len(VARIABLES)), strict=True)
    variables = {names[0]: str(port) for names, port in ports}
    with held_by_another(tmp_path / LOCK):
        error = error_of_serve("--logs", str(tmp_path), **variables)
    assert f"--logs: {tmp_path} is in use by another process" in error


def test_logs_may_be_on_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with _alone_with_logs(tmp_path / "logs"):
        assert f"no other service may use --logs {tmp_path / 'logs'}" in capsys.readouterr().err


def test_the_dashboard_uses_existing_metrics():
    dashboard = json.loads((ROOT / "deploy" / "grafana.json").read_text())
    expressions = [
        target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])
    ]
    known = {metric.name: {*WORKER_LABELS, *metric.labels} for metric in METRICS}
    known[QUEUE_SECONDS.name] = {"model_name"}
    of_front = {metric.name: set(metric.labels) for metric in (REFUSALS, START)}
    known |= of_front
    used = set()
    for expression in expressions:
        for name in re.findall(r"\b(?:ade|process)_\w+", expression):
            assert name in known, expression
            used.add(name)
        for labels in re.findall(r"by \(([^)]*)\)", expression):
            mine = set().union(*(known[name] for name in re.findall(r"\bade_\w+", expression)))
            grouped = {label.strip() for label in labels.split(",")}
            assert grouped <= mine | {"model_name", "instance"}, expression
            if "ade_drift" in expression:  # each process has its own
                assert grouped == {"instance", "model_name", "worker", "calibration"}
        everything = re.findall(r"\bade_\w+\b(?!\{[^}]*model_name=~\"\$model\")", expression)
        assert set(everything) <= set(of_front), "not of the chosen models"
    assert {
        "ade_requests_total",
        "ade_images_total",
        "ade_request_seconds_bucket",
        "ade_batch_images_bucket",
        "ade_bpd_bucket",
        "ade_worker_starts_total",
        "ade_drift_ks",
        "ade_queue_seconds_total",
        *of_front,
    } <= used
    places = [tuple(panel["gridPos"].values()) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places) and len(
        {panel["id"] for panel in dashboard["panels"]}
    ) == len(places)


def test_the_dashboard_has_the_pages_colours():
    """Of the dark scheme, which Grafana has by default; the gate comes first."""
    text = (ROOT / "deploy" / "grafana.json").read_text()
    both = dict(re.findall(r"--ade-(accept|reject): light-dark\(#\w+, (#\w+)\)", STYLE))
    assert set(re.findall(r"#[0-9a-f]{6}\b", text)) == set(both.values()) and len(both) == 2
    dashboard = json.loads(text)
    first = dashboard["panels"][0]
    assert dashboard["title"] == NAME and first["gridPos"]["y"] == 0
    coloured = {
        rule["matcher"]["options"]: rule["properties"][0]["value"]["fixedColor"]
        for rule in first["fieldConfig"]["overrides"]
    }
    assert coloured == {"/^rejected/": both["reject"], "/^promised/": both["accept"]}
