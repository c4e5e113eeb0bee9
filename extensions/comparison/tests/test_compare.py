"""Systems that are trained and measured alike, and the report about them."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from unittest.mock import Mock

import pytest
import torch
from PIL import Image

from ade_base.files import LOCK
from ade_cli.main import main
from ade_model.model import ADEModel
from extensions.comparison.compare import (
    FAILURE,
    MEASURED,
    Job,
    _check_same,
    _is_measured,
    compare,
    keep_rows,
    read_rows,
    recorded_data,
)
from extensions.comparison.judging import judge_claims
from extensions.comparison.measure import EFFICIENTNET, NOT_INDEPENDENT, MeasureOptions, Measurer
from extensions.comparison.report import _notes, _table, write_comparison
from tests.helpers import ROOT, held_by_another, interrupt_after, make_folder, narrow
from training.datasets import load_dataset
from training.loop import train
from training.run_options import RunOptions
from training.runs import RunError, write_json

STEPS = 12


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, small_images):
    return load_dataset(
        str(make_folder(tmp_path_factory.mktemp("systems") / "images", small_images)), None, 8
    )


def options(steps, **changes):
    return dataclasses.replace(
        RunOptions(
            images=16 * steps,
            device="cpu",
            precision="float32",
            checkpoint_steps=5,
            evaluate_steps=9,
        ),
        **changes,
    )


def compare_one(job, dataset, out):
    """Compare one system with itself; returns what is reported."""
    said: list[str] = []
    how = MeasureOptions(draws=1)
    compare(
        [job],
        dataset,
        {"data": "x", "root": None},
        out,
        how,
        lambda: Measurer(dataset, torch.device("cpu"), how),
        said.append,
    )
    return said


def test_a_system_that_another_process_trains_is_left_to_it(dataset, tmp_path):
    run = tmp_path / "runs" / "vae-seed0"
    run.mkdir(parents=True)
    job = Job(narrow("vae"), options(1))
    with held_by_another(run / LOCK):
        assert compare_one(job, dataset, tmp_path) == ["vae-seed0: another process works on it"]
        assert not (run / "run.json").exists()
    done = ["vae-seed0: training", "vae-seed0: measuring"]
    assert compare_one(job, dataset, tmp_path) == done
    # Measurements stay valid whatever fails later, unless the run diverged.
    for kind, stands in (("MemoryError", True), ("TrainingDiverged", False)):
        (run / FAILURE).write_text(json.dumps({"kind": kind, "why": "x", "trace": ""}))
        assert (read_rows(tmp_path)[0]["measured"] is not None) == stands
    again = f"vae-seed0: diverged before; delete {run} to try again"
    assert compare_one(job, dataset, tmp_path) == [again]


def test_measurements_with_another_network_are_other_measurements(tmp_path):
    """Distances in two networks' features cannot be compared, whatever their files are called."""
    how = {"draws": 8, "resnet20": "a digest"}
    measured = {"checkpoint": "step-1", "split": "test[0:9]", "how": how}
    (tmp_path / MEASURED).write_text(json.dumps(measured))
    for other, same in (
        (how, True),
        ({**how, "resnet20": "another"}, False),
        ({**how, "resnet20": None}, False),
        ({**how, "draws": 9}, False),
    ):
        assert _is_measured(tmp_path, tmp_path / "step-1", other, "test[0:9]") == same


def test_figures_of_another_test_part_are_measured_again(dataset, tmp_path):
    job, run = Job(narrow("vae"), options(1)), tmp_path / "runs" / "vae-seed0"
    compare_one(job, dataset, tmp_path)
    other = dataclasses.replace(dataset, splits={**dataset.splits, "test": "test[3:8]"})
    assert compare_one(job, other, tmp_path) == ["vae-seed0: measuring"]
    (row,) = read_rows(tmp_path)
    assert row["measured"]["split"] == "test[3:8]"
    write_comparison([row], tmp_path, torch.device("cpu"))
    shutil.rmtree(run)
    archived = ["vae-seed0: finished before; its archived row is used"]
    assert compare_one(job, other, tmp_path) == archived
    done = ["vae-seed0: training", "vae-seed0: measuring"]
    assert compare_one(job, dataset, tmp_path) == done


def test_a_kept_row_stands_until_its_run_is_measured_again(dataset, tmp_path):
    short, long = (Job(narrow("vae"), options(steps)) for steps in (1, 2))
    run = tmp_path / "runs" / "vae-seed0"
    compare_one(short, dataset, tmp_path)
    write_comparison(read_rows(tmp_path), tmp_path, torch.device("cpu"))
    shutil.rmtree(run)
    # The run is killed before it is measured.
    train(long.config, dataset, run, long.options, resume=False)
    (row,) = read_rows(tmp_path)
    assert row["run"] is None and row["measured"] and row["state"]["images"] == 16
    archived = "vae-seed0: finished before; its archived row is used"
    assert compare_one(short, dataset, tmp_path) == [archived]
    assert compare_one(long, dataset, tmp_path) == ["vae-seed0: measuring"]
    (row,) = read_rows(tmp_path)
    assert row["run"] == run and row["state"]["images"] == 32


@pytest.mark.parametrize("name", ["vae", "gan"])
def test_an_interrupted_run_is_no_finished_one_of_a_smaller_budget(
    dataset, tmp_path, monkeypatch, name
):
    """Its learning rates have not fallen."""
    short, long = (Job(narrow(name), options(steps)) for steps in (4, 8))
    run = tmp_path / "runs" / f"{name}-seed0"
    with monkeypatch.context() as patched:
        interrupt_after(5, patched)
        with pytest.raises(KeyboardInterrupt):
            train(long.config, dataset, run, long.options, resume=False)
    with pytest.raises(RunError, match=r"after 80 images .* a budget of 128 images: finish it"):
        compare_one(short, dataset, tmp_path)
    done = [f"{name}-seed0: training", f"{name}-seed0: measuring"]
    assert compare_one(long, dataset, tmp_path) == done
    assert compare_one(short, dataset, tmp_path) == []


@pytest.mark.parametrize("name, now", [("vae", 4), ("gan", 16)])
def test_a_run_that_diverged_blocks_no_comparison_of_another_budget(
    dataset, tmp_path, monkeypatch, name, now
):
    """Neither if it diverged beyond a smaller budget, nor after a GAN's generator was frozen."""
    config, run = narrow(name), tmp_path / "runs" / f"{name}-seed0"
    with monkeypatch.context() as patched:
        interrupt_after(5 if name == "vae" else 10, patched)
        with pytest.raises(KeyboardInterrupt):
            train(config, dataset, run, options(8), resume=False)
    (run / FAILURE).write_text(json.dumps({"kind": "TrainingDiverged", "why": "x", "trace": ""}))
    (said,) = compare_one(Job(config, options(now)), dataset, tmp_path)
    assert "diverged before" in said


def test_a_system_that_fails_before_it_begins_has_a_row(dataset, tmp_path, monkeypatch):
    job = Job(narrow("vae"), options(1))

    def fail(**given):
        raise MemoryError("no room for the weights")

    with monkeypatch.context() as patched:
        patched.setattr("training.loop.Trainer", fail)
        failed = "vae-seed0: MemoryError: no room for the weights"
        assert compare_one(job, dataset, tmp_path)[1:] == [failed]
    (row,) = read_rows(tmp_path)
    assert row["config"] == job.config and row["state"] is None
    page = write_comparison([row], tmp_path, torch.device("cpu")).read_text()
    assert "**failed: no room for the weights**" in page
    done = ["vae-seed0: training", "vae-seed0: measuring"]
    assert compare_one(job, dataset, tmp_path) == done
    (row,) = read_rows(tmp_path)
    assert row["measured"] and row["failure"] is None


def test_a_report_shows_samples_of_a_row_that_has_its_run_or_its_picture(dataset, tmp_path):
    for seed in (0, 1):
        compare_one(Job(narrow("vae"), options(1, seed=seed)), dataset, tmp_path)
    runs, pictures = tmp_path / "runs", tmp_path / "pictures"

    def samples():
        page = write_comparison(read_rows(tmp_path), tmp_path, torch.device("cpu")).read_text()
        return page[page.index("## Samples") : page.index("## Training curves")]

    shown = (
        "| vae, seed {0}, 16 images |\n|---|\n| ![samples of vae{1}](pictures/vae-seed{0}.webp) |"
    )
    assert shown.format(0, "") in samples()
    for lost, seed, label in (
        (runs / "vae-seed0", 0, ""),  # its picture is left
        (pictures, 1, " (seed 1)"),
        (runs, 1, " (seed 1)"),  # its picture is left
    ):
        shutil.rmtree(lost)
        assert shown.format(seed, label) in samples()
    shutil.rmtree(pictures)
    assert samples().endswith(
        "No samples are shown of vae: no measured run, and no earlier picture of one, is in the "
        "folder.\n\n"
    )


@pytest.mark.parametrize(
    "bound, cell",
    [
        ({"images": 5}, "4.000"),
        ({"images": 5, "elbo": 4.1}, "4.000 (ELBO 4.100)"),
    ],
)
def test_a_bound_is_shown_with_the_elbo_of_the_same_images(bound, cell):
    measured = {
        "images": 9,
        "split": "test[0:9]",
        "elbo": {"bpd": 4.2, "standard_error": 0.1, "images": 9},
        "iwae-8": {"bpd": 4.0, **bound},
    }
    row = {
        "config": narrow("vae"),
        "seed": 0,
        "state": {"images": 0},
        "measured": measured,
        "failure": None,
    }
    assert f"| 4.200 ± 0.100 | {cell} |" in _table([row])[2]
    (notes,) = _notes([row])
    assert "iwae-8 of the first 5 of them" in notes and "but not with BPD" in notes


def test_failed_systems_are_named_after_the_report_and_in_the_exit_status(
    tmp_path, small_images, monkeypatch, capsys
):
    monkeypatch.setattr("extensions.comparison.compare.train", Mock(side_effect=ValueError("why")))
    folder, out = make_folder(tmp_path / "images", small_images[:40]), tmp_path / "out"
    words = ["compare", "vae", "v-ade", "--data", str(folder), "--image-size", "8"]
    with held_by_another(out / "runs" / "v-ade-seed0" / LOCK):
        assert main([*words, "--device", "cpu", "--out", str(out)]) == 1
    said = capsys.readouterr().err
    assert said.endswith("1 of 2 systems failed: vae-seed0\n") and (out / "report.md").is_file()


def test_processes_of_torchrun_do_not_share_a_comparison(tmp_path, monkeypatch, capsys):
    # Each process would otherwise take another system, and they would average their gradients.
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = ["compare", "vae", "--data", "cifar10", "--out", str(tmp_path / "out")]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "one process, and torchrun started 2: start it several times" in said
    assert not (tmp_path / "out").exists()


def test_a_report_alone_needs_no_data(tmp_path, monkeypatch, capsys):
    committed = ROOT / "docs" / "comparison"
    shutil.copy(committed / "rows.json", tmp_path)
    shutil.copytree(committed / "pictures", tmp_path / "pictures")
    monkeypatch.delattr("extensions.comparison.verbs.compare.dataset_of")
    absent = ["--data", "cifar10", "--root", str(tmp_path / "absent")]
    for data in ([], absent):
        (tmp_path / "report.md").unlink(missing_ok=True)
        assert main(["compare", *data, "--out", str(tmp_path), "--device", "cpu"]) == 0
        assert (tmp_path / "report.md").read_text().startswith("# 30 runs of 14 systems, size tiny")
    assert main(["compare", "vae", "--out", str(tmp_path / "out")]) == 2
    assert "--data is required" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_row_that_was_trained_otherwise_is_not_replaced(dataset, tmp_path):
    """Its only copy may be the archive."""
    rows = tmp_path / "rows.json"
    shutil.copy(ROOT / "docs" / "comparison" / "rows.json", rows)
    before = rows.read_bytes()
    refused = r"gan-seed0 in .*rows\.json was trained with data set cifar10, now images; "
    with pytest.raises(RunError, match=refused):
        compare_one(Job(narrow("gan"), options(1)), dataset, tmp_path)
    assert rows.read_bytes() == before and not (tmp_path / "runs").exists()
    job, failed = Job(narrow("gan"), options(1)), {"config": narrow("vae"), "data": "d"}
    _check_same(tmp_path, job, dataset, {**failed, "state": None})  # nothing would be lost


def test_a_long_failure_stays_in_its_row():
    why = "CUDA error: a | b\nCompile with `TORCH_USE_CUDA_DSA`\n\n" + "size mismatch; " * 99
    row = {
        "config": narrow("vae"),
        "seed": 0,
        "state": {"images": 0},
        "measured": None,
        "failure": {"why": why},
    }
    table = _table([row])
    assert len(table) == 3 and "\n" not in table[2] and len(table[2]) < 400
    assert r"**failed: CUDA error: a \| b Compile with `TORCH_USE_CUDA_DSA` size" in table[2]
    cells = [re.findall(r"(?<!\\)\|", line) for line in table]
    assert len(cells[0]) == len(cells[2]) == 10


@pytest.mark.slow
def test_a_comparison_resumes_records_failures_and_is_written_up(dataset, tmp_path, monkeypatch):
    said: list[str] = []

    how = MeasureOptions(draws=2)

    def run(chosen, how=how, out=tmp_path):
        said.clear()
        compare(
            chosen,
            dataset,
            {"data": "x", "root": None},
            out,
            how,
            lambda: Measurer(dataset, torch.device("cpu"), how, lambda line: None),
            said.append,
        )
        return list(said)

    broken = dataclasses.replace(narrow("av-gde"), g_learning_rate=1e30)
    jobs = [
        Job(config, options(STEPS))
        for config in (narrow("vae"), broken, narrow("gan"), narrow("v-ade"))
    ]
    jobs.append(Job(narrow("vae"), options(STEPS, seed=1)))
    assert "av-gde-seed0: TrainingDiverged" in "".join(run(jobs[:3]))
    first = (tmp_path / "runs" / "vae-seed0" / MEASURED).read_text()
    again = run(jobs)
    assert not [
        line
        for line in again
        if line.startswith(("vae-seed0", "gan-seed0", "av-gde-seed0: training"))
    ]
    assert (tmp_path / "runs" / "vae-seed0" / MEASURED).read_text() == first
    assert (
        "diverged before" in "".join(again)
        and (tmp_path / "runs" / "av-gde-seed0" / FAILURE).is_file()
    )
    rows = read_rows(tmp_path)
    assert [row["name"] for row in rows] == [
        "av-gde-seed0",
        "gan-seed0",
        "v-ade-seed0",
        "vae-seed0",
        "vae-seed1",
    ]
    page = write_comparison(rows, tmp_path, torch.device("cpu")).read_text()
    assert "**failed: step" in page and "| vae (seed 1) |" in page and "[4.4" not in page
    assert "V-ADE beats VAE on bits per dimension" in page and "| [7.0] | 31.4 |" in page
    for picture in ("vae-seed0.webp", "gan-seed0.webp", "curve-bpd.png", "curve-d_loss.png"):
        assert (
            f"pictures/{picture}" in page and (tmp_path / "pictures" / picture).stat().st_size > 500
        )
    # Where the runs' folders are gone, the rows that were kept stand for them, in the report and in
    # what is left to do.
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copytree(tmp_path / "pictures", elsewhere / "pictures")
    shutil.copy(tmp_path / "rows.json", elsewhere)
    assert run(jobs[:1] + jobs[2:4], out=elsewhere) == [
        f"{name}-seed0: finished before; its archived row is used"
        for name in ("vae", "gan", "v-ade")
    ]
    assert run([Job(jobs[0].config, options(2 * STEPS))], out=elsewhere) == [
        "vae-seed0: training",
        "vae-seed0: measuring",
    ]
    shutil.rmtree(elsewhere / "runs")
    assert (
        write_comparison(read_rows(elsewhere), elsewhere, torch.device("cpu")).read_text() == page
    )
    # Measured otherwise, or trained for longer, a run is measured again.
    assert run(jobs[:1], MeasureOptions(draws=3)) == ["vae-seed0: measuring"]
    assert run([Job(jobs[0].config, options(2 * STEPS))], MeasureOptions(draws=3)) == [
        "vae-seed0: training",
        "vae-seed0: measuring",
    ]
    refused = f"finished after {16 * STEPS} images: its budget cannot be raised"
    with pytest.raises(RunError, match=refused):
        run([jobs[3], Job(jobs[2].config, options(2 * STEPS))])
    started = (tmp_path / "runs" / "gan-seed0" / "run.json").read_text()
    with pytest.raises(RunError, match=refused):
        run([jobs[3], Job(jobs[2].config, options(2 * STEPS, minutes=60))])
    assert (tmp_path / "runs" / "gan-seed0" / "run.json").read_text() == started
    # A run that was trained on is not what was measured; where rows were measured otherwise, the
    # notes say of which.
    (found,) = [row for row in read_rows(tmp_path) if row["name"] == "gan-seed0"]
    many = [{**row, "seed": seed} for seed in range(10) for row in rows if row["measured"]]
    page = write_comparison(
        [*many, {**found, "measured": {**found["measured"], "images": 7}}],
        tmp_path / "elsewhere",
        torch.device("cpu"),
    ).read_text()
    assert "the ELBO of 7 held-out images" in page and "(gan)" in page
    train(
        jobs[3].config, dataset, tmp_path / "runs" / "v-ade-seed0", options(2 * STEPS), resume=True
    )
    (found,) = [row for row in read_rows(tmp_path) if row["name"] == "v-ade-seed0"]
    assert found["measured"] is None and found["state"]["images"] == 32 * STEPS
    with pytest.raises(RunError, match=r"trained with learning_rate 0\.0005, now 0\.1"):
        run([Job(dataclasses.replace(narrow("vae"), learning_rate=0.1), options(2 * STEPS))])


def test_the_comparison_is_what_its_rows_say(tmp_path):
    committed = ROOT / "docs" / "comparison"
    shutil.copy(committed / "rows.json", tmp_path)
    shutil.copytree(committed / "pictures", tmp_path / "pictures")
    page = write_comparison(read_rows(tmp_path), tmp_path, torch.device("cpu")).read_text()
    documented = (ROOT / "docs" / "comparison.md").read_text()
    for finding, claim in judge_claims(read_rows(tmp_path)):
        assert f"\n- {finding.value}: {claim}\n" in page
        assert f"\n| {claim.split(' (after')[0]} | {finding.value.strip('*')} |\n" in documented
    assert (tmp_path / "rows.json").read_text() == (committed / "rows.json").read_text()
    for picture in re.findall(r"\(pictures/([^)]+)\)", page):
        assert (committed / "pictures" / picture).is_file()
    # A claim is of two systems that learned alike.
    rows = read_rows(tmp_path)
    for row in rows:
        row["state"]["images"] //= 2 if row["config"].recipe == "av-ade" else 1
    page = write_comparison(rows, tmp_path, torch.device("cpu")).read_text()
    assert "undecided: AV-ADE beats VAE on samples (after 200,000 and 400,000 images)" in page
    assert "**holds**: V-ADE beats VAE on bits per dimension" in page
    # Time is a budget as well, if it was spent.
    for row in rows:
        row["budget"]["minutes"] = 10.0
        row["state"]["seconds"] = 599.0 if row["config"].recipe == "vae" else 601.0
    page = write_comparison(rows, tmp_path, torch.device("cpu")).read_text()
    assert "**holds**: AV-ADE beats V-ADE on samples (after 10 minutes, seed 0: " in page
    assert "undecided: AV-ADE beats VAE on samples (after 200,000 and 400,000 images)" in page
    # Another seed may have been measured.
    (seed1,) = [row for row in rows if row["name"] == "av-ade-seed1"]
    seed1["state"]["images"] = 400_000
    page = write_comparison(rows, tmp_path, torch.device("cpu")).read_text()
    assert "**holds**: AV-ADE beats VAE on samples (after 400,000 images, seeds 0 and 1: " in page


@pytest.mark.slow
def test_distances_in_the_features_that_trained_a_model_are_marked(dataset):
    how = MeasureOptions(draws=1, efficientnet=True, efficientnet_samples=30, samples=30)
    measurer = Measurer(dataset, torch.device("cpu"), how)
    model = ADEModel(narrow("av-ade-pd").model)
    for name, marked in (("av-ade", False), ("av-ade-pd", True)):
        found = measurer.measure(model, {"recipe": name, "operations": ["sample", "score"]})
        assert ("independent" in found["distances"]["mean"][EFFICIENTNET]) == marked
        # 30 samples have a singular covariance of 1280 features.
        assert found["distances"]["mean"][EFFICIENTNET]["rank_deficient"] is True


def test_the_report_marks_distances_in_the_features_of_a_discriminator(tmp_path):
    def row(name, space):
        measured = {
            "distances": {
                "mean": {
                    EFFICIENTNET: {
                        "samples": 9,
                        "reference": "9 images",
                        "frechet": 5.0,
                        **space,
                    }
                }
            }
        }
        return {
            "name": name,
            "run": None,
            "config": narrow(name),
            "data": "x",
            "seed": 0,
            "budget": {"minutes": None},
            "state": {"images": 64, "step": 4, "seconds": 1.0},
            "measured": measured,
            "failure": None,
            "curves": {"bpd": [[], []], "quality_loss": [[], []], "d_loss": [[1, 2], [3.0, 4.0]]},
        }

    rows = [
        row("av-ade", {}),
        row("av-ade-pd", {"independent": NOT_INDEPENDENT}),
        row("real-nvp", {"rank_deficient": True}),
    ]
    page = write_comparison(rows, tmp_path, torch.device("cpu")).read_text()
    marked = [line for line in page.splitlines() if "(not independent)" in line]
    assert len(marked) == 2 and all(line.startswith("| av-ade-pd |") for line in marked)
    # The Fréchet distance, and precision and recall.
    assert [line.count("(not independent)") for line in marked] == [1, 2]
    assert "Not independent: the model was trained against these features." in page
    assert "![discriminator, nats (av-ade-pd: of a hinge loss, without unit). Logits of a " in page
    assert "it is not the published network" in page
    assert "unreliable, of fewer images than features (real-nvp)" in page
    page = write_comparison(rows[:1], tmp_path, torch.device("cpu")).read_text()
    assert "ndependent" not in page and "published network" not in page
    assert "![discriminator, nats](" in page


def test_a_comparison_is_of_one_folder(small_images, tmp_path, capsys):
    """Even if another has the same name, and even if the runs' folders are gone."""
    mine = make_folder(tmp_path / "a" / "photos", small_images)
    other = shutil.copytree(mine, tmp_path / "b" / "photos")
    out = tmp_path / "out"
    run, source = out / "runs" / "vae-seed0", {"data": str(mine), "root": None}
    trained_on = load_dataset(str(mine), None, 8)
    train(narrow("vae"), trained_on, run, options(1), resume=False, source=source)
    given = ["compare", "v-ade", "--image-size", "8", "--out", str(out), "--data"]
    keep_rows(read_rows(out), out)
    for _ in range(2):
        assert main([*given, str(other)]) == 2
        said = capsys.readouterr().err
        assert f"{run} was trained on {mine}, not on {other}: give the same --data" in said
        assert not (out / "cache").exists() and not (out / "runs" / "v-ade-seed0").exists()
        shutil.rmtree(out / "runs", ignore_errors=True)
    assert recorded_data(out) == {run: str(mine)}
    write_json(out / "rows.json", [{"name": "vae-seed0"}])  # of an earlier version
    assert recorded_data(out) == {}
    runs = [out / "runs" / name for name in "dafcbeg"]
    for run in runs:
        run.mkdir(parents=True)
        write_json(run / "data.json", {"data": str(mine)})
    assert list(recorded_data(out)) == sorted(runs)  # an error names the first


@pytest.mark.parametrize(
    "words, message",
    [
        (["vae", "--resnet20", "no.npz"], "no.npz does not hold a ResNet-20"),
        (["vae", "--inception", "no.pth"], "there is no file no.pth"),
        ([], "there is no such folder to report on"),
        (["vae", "--out", "DATA/run"], "--out must lie outside of"),
        (["av-ade", "--image-size", "50"], "got 50\n"),
        (["best"], "RECIPE must be one of"),
    ],
)
def test_the_command_line_says_what_is_wrong(
    words, message, tmp_path, small_images, monkeypatch, capsys
):
    """Before an image is decoded."""
    monkeypatch.setattr("training.datasets.folder.decode_into", None)
    data = str(make_folder(tmp_path / "images", small_images[:40]))
    given = ["--data", data, "--image-size", "8", "--out", str(tmp_path / "out")]
    words = [word.replace("DATA", data) for word in words]
    assert main(["compare", *words[:1], *given, *words[1:]]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "width, height, message",
    [
        (250, 150, "got 150, the size of the first image in {}: give --image-size 64"),
        (500, 336, "has 336 pixels per side, and all would be read"),
    ],
)
def test_an_image_size_that_the_user_did_not_give_is_explained(
    width, height, message, tmp_path, capsys
):
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (width, height)).save(photos / "a.png")
    assert main(["compare", "av-ade", "--data", str(photos), "--out", str(tmp_path / "out")]) == 2
    assert message.format(photos) in capsys.readouterr().err


@pytest.mark.parametrize(
    "option, message",
    [
        (["--resnet20", "nowhere.npz"], "nowhere.npz does not hold a ResNet-20"),
        (["--inception", "nowhere.pth"], "there is no file nowhere.pth"),
    ],
)
def test_images_are_not_decoded_if_the_network_that_measures_is_missing(
    option, message, tmp_path, small_images, monkeypatch, capsys
):
    folder = make_folder(tmp_path / "images", small_images[:60])
    monkeypatch.setattr("training.datasets.folder.decode_into", None)
    arguments = ["vae", "--out", str(tmp_path / "out"), "--image-size", "8"]
    assert main(["compare", *arguments, "--data", str(folder), *option]) == 2
    assert message in capsys.readouterr().err
