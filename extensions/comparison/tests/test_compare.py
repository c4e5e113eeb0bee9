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
from extensions.comparison.compare import Comparison, Job
from extensions.comparison.judging import judge_claims
from extensions.comparison.measure import MeasureOptions, Measurer
from extensions.comparison.paper import Finding
from extensions.comparison.report import write_comparison
from extensions.comparison.rows import (
    EFFICIENTNET,
    FAILURE,
    MEASURED,
    Bound,
    Distance,
    keep_rows,
    read_rows,
    recorded_data,
)
from extensions.comparison.tests import made
from tests.helpers import ROOT, held_by_another, interrupt_after, make_folder, narrow
from training.datasets import load_dataset
from training.loop import train
from training.run_options import RunOptions
from training.runs import RunError, write_json

CPU, ONE_DRAW = torch.device("cpu"), MeasureOptions(draws=1)
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


def compare(jobs, dataset, out, how=ONE_DRAW):
    """Compare systems; returns what is reported, but for what is measured."""
    said = []
    Comparison(dataset, {"data": "x", "root": None}, out, how, CPU, said.append).run(jobs)
    names = [job.name for job in jobs]
    return [line for line in said if line.split(":")[0] in names]


def done(*names):
    return [f"{name}-seed0: {verb}" for name in names for verb in ("training", "measuring")]


def archived(*names):
    return [f"{name}-seed0: finished before; its archived row is used" for name in names]


def page_of(rows, out):
    return write_comparison(rows, out, CPU).read_text()


def interrupted(config, dataset, run, steps, monkeypatch):
    """A run of eight steps that ends after some."""
    with monkeypatch.context() as patched:
        interrupt_after(steps, patched)
        with pytest.raises(KeyboardInterrupt):
            train(config, dataset, run, options(8), resume=False)


def test_a_system_that_another_process_trains_is_left_to_it(dataset, tmp_path):
    run = tmp_path / "runs" / "vae-seed0"
    run.mkdir(parents=True)
    job = Job(narrow("vae"), options(1))
    with held_by_another(run / LOCK):
        said = compare([job], dataset, tmp_path)
        assert said == ["vae-seed0: another process works on it"]
        assert not (run / "run.json").exists()
    assert compare([job], dataset, tmp_path) == done("vae")
    # Measurements stay valid whatever fails later, unless the run diverged.
    for kind, stands in (("MemoryError", True), ("TrainingDiverged", False)):
        (run / FAILURE).write_text(json.dumps({"kind": kind, "why": "x", "trace": ""}))
        assert (read_rows(tmp_path)[0].measured is not None) == stands
    again = f"vae-seed0: diverged before; delete {run} to try again"
    assert compare([job], dataset, tmp_path) == [again]


@pytest.mark.parametrize("changed", ["resnet20", "draws", "samples", "bound_images"])
def test_what_was_measured_otherwise_is_measured_again(dataset, tmp_path, changed):
    """Distances in two networks' features cannot be compared, whatever their files are called."""
    job, path = Job(narrow("vae"), options(1)), tmp_path / "runs" / "vae-seed0" / MEASURED
    compare([job], dataset, tmp_path)
    assert compare([job], dataset, tmp_path) == []
    measured = json.loads(path.read_text())
    measured["how"][changed] = "another"
    path.write_text(json.dumps(measured))
    assert compare([job], dataset, tmp_path) == ["vae-seed0: measuring"]


def test_figures_of_another_test_part_are_measured_again(dataset, tmp_path):
    job = Job(narrow("vae"), options(1))
    compare([job], dataset, tmp_path)
    other = dataclasses.replace(dataset, splits={**dataset.splits, "test": "test[3:8]"})
    assert compare([job], other, tmp_path) == ["vae-seed0: measuring"]
    (row,) = read_rows(tmp_path)
    assert row.measured.split == "test[3:8]"
    keep_rows([row], tmp_path)
    shutil.rmtree(row.run)
    assert compare([job], other, tmp_path) == archived("vae")
    assert compare([job], dataset, tmp_path) == done("vae")


def test_a_kept_row_stands_until_its_run_is_measured_again(dataset, tmp_path):
    short, long = (Job(narrow("vae"), options(steps)) for steps in (1, 2))
    run = tmp_path / "runs" / "vae-seed0"
    compare([short], dataset, tmp_path)
    keep_rows(read_rows(tmp_path), tmp_path)
    shutil.rmtree(run)
    # The run is killed before it is measured.
    train(long.config, dataset, run, long.options, resume=False)
    (row,) = read_rows(tmp_path)
    assert row.run is None and row.measured and row.images == 16
    assert compare([short], dataset, tmp_path) == archived("vae")
    assert compare([long], dataset, tmp_path) == ["vae-seed0: measuring"]
    (row,) = read_rows(tmp_path)
    assert row.run == run and row.images == 32


@pytest.mark.parametrize("name", ["vae", "gan"])
def test_an_interrupted_run_is_no_finished_one_of_a_smaller_budget(
    dataset, tmp_path, monkeypatch, name
):
    """Its learning rates have not fallen."""
    short, long = (Job(narrow(name), options(steps)) for steps in (4, 8))
    interrupted(long.config, dataset, tmp_path / "runs" / long.name, 5, monkeypatch)
    with pytest.raises(RunError, match=r"after 80 images, .* a budget of 128 images: finish it"):
        compare([short], dataset, tmp_path)
    assert compare([long], dataset, tmp_path) == done(name)
    assert compare([short], dataset, tmp_path) == []


@pytest.mark.parametrize("name, now", [("vae", 4), ("gan", 16)])
def test_a_run_that_diverged_blocks_no_comparison_of_another_budget(
    dataset, tmp_path, monkeypatch, name, now
):
    """Neither if it diverged beyond a smaller budget, nor after a GAN's generator was frozen."""
    config, run = narrow(name), tmp_path / "runs" / f"{name}-seed0"
    interrupted(config, dataset, run, 5 if name == "vae" else 10, monkeypatch)
    (run / FAILURE).write_text(json.dumps({"kind": "TrainingDiverged", "why": "x", "trace": ""}))
    (said,) = compare([Job(config, options(now))], dataset, tmp_path)
    assert "diverged before" in said


def test_a_run_of_minutes_is_finished_once_their_images_are_seen(dataset, tmp_path):
    run = tmp_path / "runs" / "vae-seed0"
    train(narrow("vae"), dataset, run, options(3), resume=False)
    started = json.loads((run / "run.json").read_text())
    started["options"]["minutes"] = 1.0  # which became that many images
    write_json(run / "run.json", started)
    job = Job(narrow("vae"), options(1000, minutes=1.0))
    assert compare([job], dataset, tmp_path) == ["vae-seed0: measuring"]


def test_a_system_that_fails_before_it_begins_has_a_row(dataset, tmp_path, monkeypatch):
    job = Job(narrow("vae"), options(1))
    with monkeypatch.context() as patched:
        fail = Mock(side_effect=MemoryError("no room for the weights"))
        patched.setattr("training.loop.Trainer", fail)
        failed = "vae-seed0: MemoryError: no room for the weights"
        assert compare([job], dataset, tmp_path)[1:] == [failed]
    (row,) = read_rows(tmp_path)
    assert row.config == job.config and not row.images
    assert "**failed: no room for the weights**" in page_of([row], tmp_path)
    assert compare([job], dataset, tmp_path) == done("vae")
    (row,) = read_rows(tmp_path)
    assert row.measured and row.failure is None


def test_a_report_shows_samples_of_a_row_that_has_its_run_or_its_picture(dataset, tmp_path):
    jobs = [Job(narrow("vae"), options(1, seed=seed)) for seed in (0, 1)]
    compare(jobs, dataset, tmp_path)
    runs, pictures = tmp_path / "runs", tmp_path / "pictures"

    def samples():
        page = page_of(read_rows(tmp_path), tmp_path)
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


@pytest.mark.parametrize("elbo, cell", [(None, "4.000"), (4.1, "4.000 (ELBO 4.100)")])
def test_a_bound_is_shown_with_the_elbo_of_the_same_images(elbo, cell, tmp_path):
    measured = {"bpd": 4.2, "bpd_error": 0.1, "bound": Bound(4.0, 8, 5, elbo)}
    page = page_of([made.run("vae", changes={"measured": measured})], tmp_path)
    assert f"| 4.200 ± 0.100 | {cell} |" in page
    assert "iwae-8 of the first 5 of them" in page and "but not with BPD" in page


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
        compare([Job(narrow("gan"), options(1))], dataset, tmp_path)
    assert rows.read_bytes() == before and not (tmp_path / "runs").exists()
    # Nothing would be lost of a run that failed before its first checkpoint.
    lost = made.run("vae", images=0, name="gan-seed0", measured=None)
    keep_rows([lost], tmp_path)
    assert compare([Job(narrow("gan"), options(1))], dataset, tmp_path) == done("gan")


@pytest.mark.parametrize("content", ['[{"name": "vae-seed0"}]', '[{"measured": null}]', "[1]"])
def test_rows_of_another_version_are_refused(content, tmp_path):
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(RunError, match=r"rows.json is damaged, or of another version \("):
        read_rows(tmp_path)


def test_a_long_failure_stays_in_its_row(tmp_path):
    why = "CUDA error: a | b\nCompile with `TORCH_USE_CUDA_DSA`\n\n" + "size mismatch; " * 99
    page = page_of([made.run("vae", measured=None, failure=why)], tmp_path)
    header, _, line = page[page.index("| system ") :].splitlines()[:3]
    assert len(line) < 400
    assert r"**failed: CUDA error: a \| b Compile with `TORCH_USE_CUDA_DSA` size" in line
    assert len(re.findall(r"(?<!\\)\|", header)) == len(re.findall(r"(?<!\\)\|", line)) == 10


@pytest.mark.slow
def test_a_comparison_resumes_records_failures_and_is_written_up(dataset, tmp_path):
    two, three = MeasureOptions(draws=2), MeasureOptions(draws=3)
    broken = dataclasses.replace(narrow("av-gde"), g_learning_rate=1e30)
    configs = (narrow("vae"), broken, narrow("gan"), narrow("v-ade"))
    vae, av_gde, gan, v_ade = (Job(config, options(STEPS)) for config in configs)
    other_seed = Job(vae.config, options(STEPS, seed=1))
    longer = Job(vae.config, options(2 * STEPS))
    runs = tmp_path / "runs"
    first = "".join(compare([vae, av_gde, gan], dataset, tmp_path, two))
    assert "av-gde-seed0: TrainingDiverged" in first
    measured = (runs / "vae-seed0" / MEASURED).read_text()
    jobs = [vae, av_gde, gan, v_ade, other_seed]
    again = compare(jobs, dataset, tmp_path, two)
    assert "diverged before" in again[0] and (runs / "av-gde-seed0" / FAILURE).is_file()
    assert again[1:] == [*done("v-ade"), "vae-seed1: training", "vae-seed1: measuring"]
    assert (runs / "vae-seed0" / MEASURED).read_text() == measured
    rows = read_rows(tmp_path)
    assert [row.name for row in rows] == sorted(job.name for job in jobs)
    page = page_of(rows, tmp_path)
    assert "**failed: step" in page and "| vae (seed 1) |" in page and "[4.4" not in page
    assert "V-ADE beats VAE on bits per dimension" in page and "| [7.0] | 31.4 |" in page
    for picture in ("vae-seed0.webp", "gan-seed0.webp", "curve-bpd.png", "curve-d_loss.png"):
        assert f"pictures/{picture}" in page
        assert (tmp_path / "pictures" / picture).stat().st_size > 500
    # Where the runs' folders are gone, the rows that were kept stand for them, in the report and in
    # what is left to do.
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "pictures", elsewhere / "pictures")
    shutil.copy(tmp_path / "rows.json", elsewhere)
    names = ("vae", "gan", "v-ade")
    assert compare([vae, gan, v_ade], dataset, elsewhere, two) == archived(*names)
    assert compare([longer], dataset, elsewhere, two) == done("vae")
    shutil.rmtree(elsewhere / "runs")
    assert page_of(read_rows(elsewhere), elsewhere) == page
    # Measured otherwise, or trained for longer, a run is measured again.
    assert compare([vae], dataset, tmp_path, three) == ["vae-seed0: measuring"]
    assert compare([longer], dataset, tmp_path, three) == done("vae")
    started = (runs / "gan-seed0" / "run.json").read_text()
    for budget in (options(2 * STEPS), options(2 * STEPS, minutes=60)):
        refused = f"after {16 * STEPS} images: its budget cannot be|minutes became {16 * STEPS} "
        with pytest.raises(RunError, match=refused):
            compare([v_ade, Job(gan.config, budget)], dataset, tmp_path, two)
        assert (runs / "gan-seed0" / "run.json").read_text() == started
    # Where rows were measured otherwise, the notes say of which.
    few = [dataclasses.replace(row.measured, images=7) for row in rows if row.name == "gan-seed0"]
    mixed = [*(row for row in rows if row.measured), dataclasses.replace(rows[1], measured=few[0])]
    page = page_of(mixed, elsewhere)
    assert "the ELBO of 7 held-out images" in page and "(gan)" in page
    # A run that was trained on is not what was measured.
    train(v_ade.config, dataset, runs / "v-ade-seed0", options(2 * STEPS), resume=True)
    (found,) = [row for row in read_rows(tmp_path) if row.name == "v-ade-seed0"]
    assert found.measured is None and found.images == 32 * STEPS
    faster = dataclasses.replace(vae.config, learning_rate=0.1)
    with pytest.raises(RunError, match=r"trained with learning_rate 0\.0005, now 0\.1"):
        compare([Job(faster, options(2 * STEPS))], dataset, tmp_path, two)


def test_the_comparison_is_what_its_rows_say(tmp_path):
    committed = ROOT / "docs" / "comparison"
    shutil.copy(committed / "rows.json", tmp_path)
    shutil.copytree(committed / "pictures", tmp_path / "pictures")
    rows = read_rows(tmp_path)
    page = page_of(rows, tmp_path)
    documented = (ROOT / "docs" / "comparison.md").read_text()
    for finding, claim in judge_claims(rows):
        assert f"\n- {finding.value}: {claim}\n" in page
        assert f"\n| {claim.split(' (after')[0]} | {finding.value.strip('*')} |\n" in documented
    assert read_rows(tmp_path) == rows
    for picture in re.findall(r"\(pictures/([^)]+)\)", page):
        assert (committed / "pictures" / picture).is_file()
    # A claim is of two systems that learned alike.
    halved = [
        dataclasses.replace(row, images=row.images // (1 + (row.system == "av-ade")))
        for row in rows
    ]
    judged = judge_claims(halved)
    different = "AV-ADE beats VAE on samples (after 200,000 and 400,000 images)"
    assert (Finding.UNDECIDED, different) in judged
    assert any(
        finding is Finding.HOLDS and text.startswith("V-ADE beats VAE on bits per dimension")
        for finding, text in judged
    )
    # Another seed may have been measured.
    other = [
        dataclasses.replace(row, images=400_000) if row.name == "av-ade-seed1" else row
        for row in halved
    ]
    after = "AV-ADE beats VAE on samples (after 400,000 images, seeds 0 and 1: "
    assert any(f is Finding.HOLDS and text.startswith(after) for f, text in judge_claims(other))


@pytest.mark.slow
def test_distances_in_the_features_that_trained_a_model_are_marked(dataset):
    how = MeasureOptions(draws=1, efficientnet=True, samples=60)
    measurer = Measurer(dataset, CPU, how)
    model = ADEModel(narrow("av-ade-pd").model)
    for name, is_independent in (("av-ade", True), ("av-ade-pd", False)):
        found = measurer.measure(model, {"recipe": name, "operations": ["sample", "score"]})
        distance = found.distances[EFFICIENTNET]
        # 30 samples have a singular covariance of 1280 features.
        assert distance.is_independent == is_independent and not distance.is_reliable


def test_the_report_marks_distances_in_the_features_of_a_discriminator(tmp_path):
    def row(name, **changes):
        distance = Distance(5.0, 9, "9 images", precision=0.5, recall=0.5, **changes)
        curves = {"bpd": [[], []], "quality_loss": [[], []], "d_loss": [[1, 2], [3.0, 4.0]]}
        measured = {"distances": {EFFICIENTNET: distance}}
        return made.run(name, changes={"measured": measured}, curves=curves)

    rows = [
        row("av-ade"),
        row("av-ade-pd", is_independent=False),
        row("real-nvp", is_reliable=False),
    ]
    page = page_of(rows, tmp_path)
    marked = [line for line in page.splitlines() if "(not independent)" in line]
    assert len(marked) == 2 and all(line.startswith("| av-ade-pd |") for line in marked)
    # The Fréchet distance, and precision and recall.
    assert [line.count("(not independent)") for line in marked] == [1, 2]
    assert "Not independent: the model was trained against these features." in page
    assert "![discriminator, nats (av-ade-pd: of a hinge loss, without unit). Logits of a " in page
    assert "it is not the published network" in page
    assert "unreliable, of fewer images than features (real-nvp)" in page
    page = page_of(rows[:1], tmp_path)
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
    (out / "rows.json").unlink()
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
