"""All systems of the paper: each trains, resumes, exports with parity, and serves its verbs."""

from __future__ import annotations

import base64
import dataclasses
import functools
import json

import numpy as np
import pytest

from ade_base.pictures.show import write_png
from ade_cli.main import main
from ade_model.checkpoint import load_model
from export.gate.calibrate import calibrate_bundle
from export.write import export_bundle
from serving.api.service import Service
from serving.engine.bundle import BundleError
from serving.engine.engine import InferenceEngine
from serving.ingest.requests import RawRequest
from tests.helpers import ROOT, make_folder, narrow
from training.config import TrainConfig
from training.datasets import load_dataset
from training.loop import train
from training.recipes import recipe_names
from training.run_options import RunOptions
from training.runs import latest_checkpoint, save_checkpoint

SYSTEMS: dict[str, TrainConfig] = {
    **{name: narrow(name) for name in recipe_names()},
    # With two blocks in each coupling instead of three or eight: an export takes as long as its
    # graphs have layers.
    **{
        f"{name} of the paper's size": narrow(name, "paper", flow_blocks=2)
        for name in ("av-ade-s2", "av-ade-iaf-rd", "real-nvp")
    },
    "gan without an inference network": narrow("gan", inference_share=0.0),
}
# Exports take long. Systems that differ in their training alone have the same graphs, and these
# only combine what the graphs of others have: a flow alone, autoregressive flows, two scales.
COMBINED = ("av-ade-s2", "av-ade-iaf-rd of the paper's size", "real-nvp of the paper's size")
EXPORTED = {c.model: name for name, c in SYSTEMS.items() if name not in COMBINED}.values()
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


def ask(service, **parameters):
    (response,) = service.answer([RawRequest("application/json", json.dumps(parameters).encode())])
    return response.status, json.loads(
        response.body
    ) if response.content_type == "application/json" else response.body


def weights(run):
    return {k: v.numpy() for k, v in load_model(latest_checkpoint(run)).state_dict().items()}


def save_and_stop(*arguments):
    save_checkpoint(*arguments)
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory):
    """A function that trains a system when it is first called for it, and returns the run."""

    @functools.cache
    def run_of(name):
        config, run = SYSTEMS[name], tmp_path_factory.mktemp("trained") / "run"
        progress = train(config, dataset, run, options(STEPS), resume=False)
        assert progress.step == round(STEPS * (1 + config.inference_share))
        return run

    return run_of


@pytest.mark.slow
@pytest.mark.parametrize("name", SYSTEMS)
def test_a_system_trains_and_resumes(name, dataset, trained, tmp_path, monkeypatch):
    config, whole, cut = SYSTEMS[name], trained(name), tmp_path / "cut"
    with monkeypatch.context() as patch:
        patch.setattr("training.loop.save_checkpoint", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            train(config, dataset, cut, options(STEPS, checkpoint_steps=STEPS // 2), resume=False)
    train(config, dataset, cut, options(STEPS), resume=True)
    a, b = weights(whole), weights(cut)
    assert all(np.array_equal(a[key], b[key]) for key in a)
    assert all(np.isfinite(value).all() for value in a.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPORTED)
def test_a_system_exports_and_serves(name, trained, tmp_path, small_images):
    config, bundle = SYSTEMS[name], tmp_path / "bundle"
    export_bundle(latest_checkpoint(trained(name)), bundle, "it", small_images[:40], None)
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert (
        manifest["recipe"] == config.recipe
        and len({row["graph"] for row in manifest["parity"]}) >= 4
    )
    if config.model.encoder:  # every system that can score gets a verdict
        calibrate_bundle(
            bundle, tmp_path / "calibrated", small_images[:100], small_images[100:200], "corners"
        )
        bundle = tmp_path / "calibrated"
    else:
        with pytest.raises(BundleError, match="cannot score"):
            calibrate_bundle(
                bundle,
                tmp_path / "calibrated",
                small_images[:100],
                small_images[100:200],
                "corners",
            )
    engine = InferenceEngine(bundle, device="cpu")
    status, answer = ask(Service("sample", engine), n=2, seed=3, format="json")
    assert status == 200 and len(answer["results"]) == 2
    image = base64.b64encode(write_png(small_images[0])).decode()
    for operation in ("encode", "reconstruct", "score"):
        status, answer = ask(
            Service(operation, engine),
            images=[image],
            **({"format": "json"} if operation != "score" else {}),
        )
        if operation not in config.model.operations:
            assert status == 422 and answer["error"]["code"] == "not_available", answer
            assert f"has no {operation}" in answer["error"]["message"]
            continue
        assert status == 200, answer
        (result,) = answer["results"]
        if operation == "score":
            assert 0 < result["p_value"] <= 1 and result["explain"]
            assert sum(result["bpd_parts"].values()) == pytest.approx(result["bpd"], abs=1e-5)
        if operation == "reconstruct" and not config.model.widths:
            assert result["psnr"] is None or result["psnr"] > 60  # a flow alone is exact
        if operation == "encode":
            status, answer = ask(Service("sample", engine), latents=[result], format="json")
            assert status == 200, answer
    status, answer = ask(Service("sample", engine), kind="density", format="json")
    if config.model.encoder:
        assert status == 200
    else:
        assert status == 422 and "has no density samples" in answer["error"]["message"]


def test_processes_of_torchrun_do_not_share_a_fit(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["fit", str(ROOT), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "one process, and torchrun started 2: start it without torchrun" in said
    assert not (tmp_path / "out").exists()
