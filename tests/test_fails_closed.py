"""No OOD image is ever accepted because a verdict is missing, whatever way it arrives."""

import base64
import dataclasses
import json
import math
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
from gradio.data_classes import FileData, ListFiles

from ade_base.pictures.show import write_png
from ade_cli.main import main
from ade_cli.score import NO_VERDICT
from ade_client.client import AdeClient, AdeError, ScoreResult
from ade_client.contract import CalibrationLabel
from export.gate.calibrate import calibrate_bundle
from serving.api.service import Service
from serving.bulk import BulkOptions, FileScorer
from serving.engine.bundle import BundleError, open_bundle
from serving.engine.engine import InferenceEngine
from serving.gate import Gate
from serving.ingest.requests import RawRequest
from serving.page import contents as page_contents
from serving.page import tab_many
from serving.page.app import build_page
from serving.page.files import write_file
from serving.page.models import Models
from serving.page.runs import Runs
from serving.page.tab_compare import card
from serving.page.tab_many import summary
from serving.page.verdict import REPLACED, Scored, explained, verdict
from serving.verdict.calibration_file import CalibrationPair
from serving.verdict.decision import Decision, decide, fdr_note, images_needed
from tests.helpers import with_calibrations
from tests.in_process import answered_here, judged, page_function

ALPHA = 0.04
# Decisions of each bundle on an OOD image of the model's size and on a resized one, at ALPHA.
EXPECTED = {
    "both": ("reject", "reject"),
    "exact": ("reject", "resized_not_calibrated"),
    "few": ("alpha_too_small", "alpha_too_small"),
    "none": ("not_calibrated", "not_calibrated"),
}
PATHS = ("of the model's size", "resized")


@pytest.fixture(scope="module")
def bundles(tiny_bundle, small_images, tmp_path_factory):
    """Bundles with calibrations for both kinds, for one, for both with too few images, for none."""
    out = tmp_path_factory.mktemp("bundles")
    calibrate_bundle(tiny_bundle, out / "calibrated", small_images[:20], small_images[20:40], "few")
    return {
        "both": with_calibrations(tiny_bundle, out / "both", lambda both: both, "both"),
        "exact": with_calibrations(
            tiny_bundle, out / "exact", lambda both: CalibrationPair(both.exact), "exact"
        ),
        "few": with_calibrations(out / "calibrated", out / "few", lambda both: both, "few"),
        "none": with_calibrations(tiny_bundle, out / "none", lambda both: None, "none"),
    }


@pytest.fixture(scope="module")
def ood_paths(tmp_path_factory):
    """An OOD image of the model's size, and a larger one."""
    folder = tmp_path_factory.mktemp("ood")
    rng = np.random.default_rng(0)
    for side in (8, 20):
        (folder / f"{side}.png").write_bytes(
            write_png(rng.integers(0, 2, (side, side, 3), np.uint8) * 255)
        )
    return [folder / "8.png", folder / "20.png"]


def check(name, path, choice, reason):
    expected = EXPECTED[name][path]
    if expected == "reject":
        assert (choice, reason) == ("reject", None)
    else:
        assert choice == "no_verdict" and reason is not None and reason.startswith(f"{expected}: ")


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("path", (0, 1), ids=PATHS)
def test_over_http_in_the_gate_in_files_and_on_the_page(name, path, bundles, ood_paths, capsys):
    engine = InferenceEngine(bundles[name], device="cpu", operations=["score"])
    image = base64.b64encode(ood_paths[path].read_bytes()).decode()
    (answer,) = Service("score", engine).answer(
        [RawRequest("application/json", {"images": [image], "resize": "fit", "alpha": ALPHA})]
    )
    (result,) = json.loads(answer.body)["results"]
    check(name, path, result["decision"], result["decision_reason"])
    assert {"decision", "decision_reason"} <= set(result)
    (gated,) = Gate(bundles[name], ALPHA).check(ood_paths[path])
    check(name, path, gated.decision, gated.reason)
    assert not gated.accepted and gated.bpd is not None
    (row,) = FileScorer(open_bundle(bundles[name]), Path(), BulkOptions(ALPHA, resize="fit"))(
        [str(ood_paths[path])]
    )
    check(name, path, row["decision"], row["decision_reason"])
    assert result["ood"] is row.get("ood") is (True if EXPECTED[name][path] == "reject" else None)
    words = ["score", str(ood_paths[path]), "--bundle", str(bundles[name])]
    status = main([*words, "--resize", "fit", "--alpha", str(ALPHA)])
    row = json.loads(capsys.readouterr().out)
    check(name, path, row["decision"], row["decision_reason"])
    assert status == (0 if row["decision"] == "reject" else NO_VERDICT)
    shown = ScoreResult(
        bpd=1.0,
        bpd_parts={},
        standard_error=None,
        ood_score=result["ood_score"],
        p_value=result["p_value"],
        ood=result["ood"],
        decision=result["decision"],
        decision_reason=result["decision_reason"],
        calibration=result.get("calibration") and CalibrationLabel(**result["calibration"]),
    )
    choice, sentence = verdict(engine.calibrations, Scored(shown, bool(path)), ALPHA)
    assert choice == row["decision"] and ("looks unlike" in sentence) == (choice == "reject")


def prefix_of(name):
    """The first bundle has no prefix, as in ``ade serve``."""
    return None if name == next(iter(EXPECTED)) else name


@pytest.fixture(scope="module")
def url(bundles):
    """Address of a server of all bundles."""
    with answered_here(bundles) as address:
        yield address


@pytest.mark.parametrize("name", EXPECTED)
def test_over_the_client(name, url, ood_paths):
    with AdeClient(url, model=prefix_of(name)) as client:
        results = client.score([*ood_paths, b"no image"], alpha=ALPHA, resize=True)
        assert not any(result.accepted for result in results)
        for path, result in enumerate(results[:2]):
            check(name, path, result.decision, result.decision_reason)
        assert isinstance(results[2], AdeError) and results[2].decision == "no_verdict"
        assert results[2].decision_reason.startswith("not_scored: not an image: expected PNG")
    if name == "both":
        with AdeClient(url, model=prefix_of(name)) as client:
            usual = client.score(client.sample(8, seed=1).images, alpha=0.01)
        assert all(result.accepted == (result.ood is False) for result in usual) and any(
            r.accepted for r in usual
        )


@pytest.fixture
def page_files(tmp_path, monkeypatch):
    """The page's folder."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "page-files"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no hash", "describes the calibration 'default' in calibration, but its files lack"),
        ("no hash of a name", "describes the calibration 'night' in calibrations, but its files"),
        ("not listed", "the manifest does not list 'calibration-night.npz'"),
        ("own not listed", "the manifest does not list 'calibration.npz'"),
        ("of versions before", "the manifest does not list 'calibrations'"),
        ("two of one name", "a calibration cannot have the name 'default'"),
        ("no name", "a calibration cannot have the name"),
        ("replaced", "calibration.npz does not match the manifest"),
        ("removed", "calibration.npz is missing"),
    ],
)
def test_a_manifest_without_the_hash_of_a_calibration_is_refused(
    change, message, bundles, tmp_path
):
    """Whoever adds or removes the file of a calibration decides nothing."""
    bundle = Path(shutil.copytree(bundles["both"], tmp_path / "bundle"))
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    own, files = bundle / "calibration.npz", manifest["files"]
    if change in ("no hash", "own not listed"):
        del files[own.name]
    if change == "own not listed":
        manifest["calibration"] = None
    if change == "no hash":
        own.unlink()
    if change == "no hash of a name":
        manifest["calibrations"] = {"night": manifest["calibration"]}
    if change == "not listed":
        shutil.copy(own, bundle / "calibration-night.npz")
    if change == "of versions before":
        (bundle / "calibrations").symlink_to(tmp_path / "not mounted")
    if change in ("two of one name", "no name"):
        name = "calibration-default.npz" if change == "two of one name" else "calibration--.npz"
        files[name] = files[own.name]
        shutil.copy(own, bundle / name)
    if change == "replaced":
        shutil.copy(bundles["few"] / own.name, own)
    if change == "removed":
        own.unlink()
    path.write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=re.escape(message)):
        InferenceEngine(bundle, device="cpu", operations=["score"])


@pytest.mark.usefixtures("page_files")
@pytest.mark.parametrize("own", ["both", "none"])
def test_the_page_judges_by_the_calibration_of_the_service(own, bundles, ood_paths):
    bundle = open_bundle(bundles[own])
    with answered_here({"both": bundle.folder}) as url, AdeClient(url) as client:
        served = Models(url, [bundle], None)
        score = page_function(served, "score")
        image = write_file(ood_paths[0].read_bytes(), "ood.png")
        (before,) = client.score([image], alpha=ALPHA)
        card, _, place, _, details, *_ = score(own, image, 1, ALPHA, False, Runs())
        assert f"ade-{before.decision}" in card
        assert ("150 held-out images" in place) == (own == "both")
        assert ("of the calibration images" in details) == (own == "both")
    # There is no verdict on what another calibration judged.
    few = CalibrationPair.load(bundles["few"] / "calibration.npz")
    if own == "both":
        assert verdict(few, Scored(before, False), 0.05) == ("no_verdict", REPLACED)
        assert explained(few, Scored(before, False), 0.05)[1:] == ("", "")


@pytest.mark.usefixtures("page_files")
def test_the_page_gives_no_verdict_if_another_release_answers(bundles, ood_paths):
    """As while a release is published."""
    with answered_here({"both": bundles["few"]}) as url:
        score = page_function(Models(url, [open_bundle(bundles["both"])], None), "score")
        image = write_file(ood_paths[0].read_bytes(), "ood.png")
        card, *_ = score("both", image, 1, ALPHA, False, Runs())
    assert "ade-no_verdict" in card and "a release was published meanwhile" in card


@pytest.mark.usefixtures("page_files")
def test_score_many_accepts_nothing_without_verdicts(bundles, small_images):
    """Too few images calibrated ``few`` for :data:`ALPHA`: images get p-values, and no verdict."""
    files = [write_file(write_png(image), f"{i}.png") for i, image in enumerate(small_images[:3])]
    with answered_here({"both": bundles["few"]}) as url:
        score_many = page_function(Models(url, [open_bundle(bundles["few"])], None), "score_many")
        said, rows, _ = score_many("few", files, None, 0.1, False, ALPHA, Runs())
        assert "ade-no_verdict" in said and "No verdict on any of 3 files" in said
        assert all(row["choice"] == "no_verdict" and row["p"] for row in rows)
        said, *_ = score_many("few", files, None, 0.1, False, 0.05, Runs())
        assert "of 3 images rejected" in said


@pytest.mark.usefixtures("page_files")
def test_score_many_tells_of_two_versions_of_a_calibration(bundles, small_images, monkeypatch):
    """As if it had been replaced between two requests."""
    files = [write_file(write_png(image), f"{i}.png") for i, image in enumerate(small_images[:2])]
    scores, versions = tab_many.scores, iter(["1", "2"])

    def changing(*given):
        label = CalibrationLabel(name="default", version=next(versions))
        return [dataclasses.replace(one, calibration=label) for one in scores(*given)]

    monkeypatch.setattr(page_contents, "AT_ONCE", 1)
    with answered_here({"both": bundles["both"]}) as url:
        score_many = page_function(Models(url, [open_bundle(bundles["both"])], None), "score_many")
        said, *_ = score_many("both", files, None, 0.1, False, ALPHA, Runs())
        assert "Two versions of the calibration" not in said
        monkeypatch.setattr(tab_many, "scores", changing)
        said, *_ = score_many("both", files, None, 0.1, False, ALPHA, Runs())
    assert "Two versions of the calibration" in said


@pytest.mark.usefixtures("page_files")
def test_files_of_other_kinds_are_not_scored_among_others(bundles, small_images, tmp_path):
    """The page keeps none of them, and names each in a row."""
    own = [write_file(write_png(image), f"{i}.png") for i, image in enumerate(small_images[:2])]
    (tmp_path / "page-files" / "uploads").mkdir(parents=True)
    photo = str(tmp_path / "page-files" / "uploads" / "photo.jxl")  # as the upload answered
    with answered_here({"both": bundles["both"]}) as url:
        page = build_page(Models(url, [open_bundle(bundles["both"])], None))
        (given,) = (
            block
            for block in page.blocks.values()
            if getattr(block, "label", "") == "Images, or a zip of them"
        )
        assert isinstance(given, gr.File)
        paths = given.preprocess(ListFiles([FileData(path=path) for path in (photo, *own)]))
        score_many = next(fn.fn for fn in page.fns.values() if fn.api_name == "score_many")
        assert score_many is not None
        said, rows, _ = score_many("both", paths, None, 0.1, False, 0.01, Runs())
    assert [row["file"] for row in rows[2:]] == ["photo.jxl"]
    assert [row["choice"] for row in rows[2:]] == ["not_scored"]
    assert rows[2]["notes"] == "This type of file is not accepted."
    assert all(row["bpd"] for row in rows[:2])
    assert "1 of 3 files got no verdict" in said and "ade-accept" not in said


@pytest.mark.usefixtures("page_files")
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("exact", "he bundle has no calibration for resized images; ade calibrate makes one"),
        ("few", "lpha 0.04 needs 24 calibration images or more; there are 20"),
        ("none", "he bundle has no calibration; ade calibrate makes one"),
    ],
)
def test_the_page_says_once_why_there_is_no_verdict(name, reason, bundles, ood_paths):
    bundle = open_bundle(bundles[name])
    with answered_here({"both": bundle.folder}, ("score", "reconstruct")) as url:
        served = Models(url, [bundle], None)
        image = write_file(ood_paths[1].read_bytes(), "ood.png")
        _, (row,), _ = page_function(served, "score_many")(
            name, [image], None, 0.1, True, ALPHA, Runs()
        )
        shown, *_ = page_function(served, "score")(name, image, 1, ALPHA, True, Runs())
        compared = card(served, name, ood_paths[1].read_bytes(), ALPHA, True)
    for said in (row["notes"], shown, compared):
        assert said.count(reason) == 1 and said.count("resized from 20 x 20") == 1
        assert "nothing can be flagged" not in said and "were not resized" not in said


def test_of_a_server_that_decides_nothing_nothing_is_accepted():
    """The server is too old to report decisions."""
    entry = {"bpd": 3.0, "bpd_parts": {}, "standard_error": None}
    verdict = {"ood_score": 1.0, "p_value": 0.5, "ood": False}
    answer = {"model": "m", "estimator": "elbo", "samples": 1, "alpha": 0.01}
    decided = {"decision": "accept", "decision_reason": None}
    error = {"error": {"code": "not_an_image", "message": "damaged"}}
    answer["results"] = [entry | verdict, entry | verdict | decided | error]

    class OldServer(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with HTTPServer(("127.0.0.1", 0), OldServer) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        with AdeClient(f"http://127.0.0.1:{server.server_port}", timeout=10) as client:
            result, contradiction = client.score([b"image", b"image"])
    assert isinstance(contradiction, AdeError) and not contradiction.accepted
    assert (
        not result.accepted
        and result.decision == "no_verdict"
        and result.decision_reason.startswith("not_reported: ")
    )
    for change in ({"ood": None}, {"ood": True}, {"p_value": None}, {"p_value": math.nan}):
        assert not dataclasses.replace(result, decision="accept", **change).accepted
    assert dataclasses.replace(result, decision="accept").accepted


def test_what_is_not_finite(bundles, ood_paths, monkeypatch):
    engine = InferenceEngine(bundles["both"], device="cpu", operations=["score"])
    whole = engine.backend.run

    def corrupted(graph, inputs, wanted=None):
        return {
            name: np.full_like(values, np.nan)
            for name, values in whole(graph, inputs, wanted).items()
        }

    monkeypatch.setattr(engine.backend, "run", corrupted)
    monkeypatch.setattr("serving.bulk.InferenceEngine", lambda *args, **options: engine)
    image = base64.b64encode(ood_paths[0].read_bytes()).decode()
    (answer,) = Service("score", engine).answer(
        [RawRequest("application/json", {"images": [image]})]
    )
    assert answer.status == 422 and json.loads(answer.body)["error"]["code"] == "not_finite"
    (row,) = FileScorer(open_bundle(bundles["both"]), Path(), BulkOptions())([str(ood_paths[0])])
    assert row["error"] == "not_finite" and row["decision"] == "no_verdict"
    monkeypatch.setattr("serving.gate.InferenceEngine", lambda *args, **options: engine)
    (gated,) = Gate(bundles["both"]).check(ood_paths[0])
    assert not gated.accepted and gated.is_error
    assert gated.reason is not None and gated.reason.startswith(
        "not_scored: the model's likelihood"
    )
    assert decide(float("nan"), engine.calibrations, False, ALPHA).choice == "no_verdict"
    assert decide(None, engine.calibrations, False, ALPHA).choice == "no_verdict"
    for alpha in (float("nan"), 0.0, -0.1, 1.1):  # 0.5 <= nan is false, as for an accepted image
        with pytest.raises(ValueError, match="alpha must be above 0 and at most 1, got"):
            decide(0.5, engine.calibrations, False, alpha)


def test_number_of_calibration_images_for_an_alpha(bundles):
    """With one image fewer nothing is accepted; with this number everything is decided."""
    for alpha, needed in ((0.1, 9), (0.05, 19), (0.01, 99), (0.003, 333), (1.0, 0)):
        assert images_needed(alpha) == needed
        assert 1 / (needed + 1) <= alpha * (1 + 1e-12) and (needed == 0 or 1 / needed > alpha)
    few = CalibrationPair.load(bundles["few"] / "calibration.npz")
    assert (
        decide(0.9, few, False, 1 / 21) == Decision("accept")
        and decide(0.9, few, False, 1 / 21).ood is False
        and decide(1 / 21, few, False, 1 / 21).choice == "reject"
    )
    assert "needs more than 1,000,000,000 calibration images" in str(
        decide(0.9, few, False, 1e-320).reason
    )
    assert decide(0.9, few, False, 0.047).reason == (
        "alpha_too_small: alpha 0.047 needs 21 calibration images or more; there are 20"
    )


def test_a_tiny_alpha(bundles):
    """Its reciprocal is infinite. There is no verdict, and no error."""
    engine = InferenceEngine(bundles["few"], device="cpu", operations=["score"])
    image = base64.b64encode(write_png(np.zeros((8, 8, 3), np.uint8))).decode()
    for tiny in (5e-324, 1e-310):
        (answer,) = Service("score", engine).answer(
            [RawRequest("application/json", {"images": [image] * 2, "alpha": tiny, "fdr": tiny})]
        )
        body = json.loads(answer.body)
        assert (
            answer.status == 200 and [r["decision"] for r in body["results"]] == ["no_verdict"] * 2
        )
        assert body["group"]["discoveries"] == 0


def test_discoveries_that_too_few_calibration_images_make_impossible(bundles, small_images):
    """A note says so, and individually rejected images are counted too."""
    engine = InferenceEngine(bundles["few"], device="cpu", operations=["score"])
    noise = np.random.default_rng(0).integers(0, 2, (3, 8, 8, 3), np.uint8) * 255
    images = [
        base64.b64encode(write_png(pixels)).decode() for pixels in (*small_images[200:207], *noise)
    ]
    (answer,) = Service("score", engine).answer(
        [RawRequest("application/json", {"images": images, "fdr": 0.1, "alpha": 0.05})]
    )
    body = json.loads(answer.body)
    assert body["group"]["discoveries"] == 0 and body["group"]["rejected"] >= 3
    assert [r["decision"] for r in body["results"][-3:]] == ["reject"] * 3
    (note,) = body["group"]["notes"]
    assert (
        note
        == fdr_note(20, 10, 0.1)
        == (
            "at a false discovery rate of 0.1, at least 5 of 10 images must have the smallest "
            "p-value, 1/21, before any is "
            "reported; to report a single one takes 99 calibration images"
        )
    )
    assert "at least 6 of 100" in str(fdr_note(169, 100, 0.1)) and "takes 999" in str(
        fdr_note(169, 100, 0.1)
    )
    assert "none of 100 images can be reported" in str(fdr_note(5, 100, 0.1))
    assert fdr_note(999, 100, 0.1) is None and fdr_note(998, 100, 0.1) is not None
    # Five images of one colour among a hundred, on the page.
    said = summary([*5 * [judged(1 / 170, "reject")], *95 * [judged()]], 0.01, 0.1, [169])
    assert "5 of 100 images rejected" in said and "ade-reject" in said
    assert (
        "At a false discovery rate of 0.1, at least 6 of 100 images must have the smallest p-value"
        in said
    )
    assert "at least" not in summary(100 * [judged()], 0.01, 0.1, [3000])
    # Only the calibrations that judged the files count; two of them give no guarantee together.
    assert "Two calibrations" not in said
    assert "Two calibrations judged" in summary(3 * [judged()], 0.01, 0.1, [3000, 20])
    assert "Two versions of the calibration" in summary(
        [judged(), judged(version="2")], 0.01, 0.1, [3000]
    )
    # Files without a verdict keep the summary from looking like acceptance.
    unjudged = summary([*99 * [judged()], AdeError(415, "x", "x")], 0.01, 0.1, [3000])
    assert "ade-no_verdict" in unjudged and "1 of 100 files got no verdict" in unjudged


def test_no_example_in_the_documentation_accepts_images_only_because_they_are_not_ood():
    root = Path(__file__).parents[1]
    for page in (
        root / "README.md",
        *(root / "docs").rglob("*.md"),
        *(root / "docs").rglob("*.ipynb"),
    ):
        for line in page.read_text().splitlines():
            assert not re.search(r"\bif (not )?\w\S*\bood\b", line), (page, line)
