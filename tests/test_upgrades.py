"""Bundles are replaced while a service runs: no request fails, no answer is of two models."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import (
    AbstractContextManager,
    asynccontextmanager,
    contextmanager,
    nullcontext,
    suppress,
)
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file, save_file

from ade_cli.main import main
from ade_cli.status import _releases
from ade_client.client import AdeClient, AdeError
from handlers.front.admission import Limits
from handlers.front.releases import Release, Releases
from handlers.launch.engines import SWITCHED, UpgradableEngine
from handlers.launch.upgrades import ROLLBACK, UPGRADE, UpgradeError, Upgrades, check_contract
from handlers.process.launcher import Asgi
from handlers.processes.channel import ChannelError, Listener, ask
from handlers.processes.supervision import LaunchError
from handlers.service.application import build_release
from handlers.service.control import CHANGE, DESCRIBE
from serving.engine.bundle import (
    CALIBRATION_NAME,
    MANIFEST_NAME,
    WEIGHTS_NAME,
    Bundle,
    BundleError,
    open_bundle,
    write_manifest,
)
from serving.engine.calibrations import open_calibrations, seen_file
from serving.page.models import Models
from serving.verdict.calibration_file import Calibrations
from serving.verdict.store import (
    FOLDER,
    path_of,
    write_calibrations,
)
from tests.helpers import PRETRAINED, ROOT, suspended, wait_for, with_calibrations
from tests.service import RunningService
from tests.test_asgi import RunningApplication, is_running, release_of
from tests.test_security import as_nobody

CLIENTS = 3
CAT = (ROOT / "serving" / "examples" / "cat.png").read_bytes()


def changed_copy(target: Path, change: Callable[[Path], object]) -> Path:
    """The shipped bundle with changed files, and a manifest that matches them."""
    shutil.copytree(PRETRAINED, target)
    change(target)
    fields = {key: value for key, value in open_bundle(target).manifest.items() if key != "files"}
    write_manifest(target, fields)
    return target


def disturb(folder: Path) -> None:
    """Another model: its answers differ."""
    weights = load_file(folder / WEIGHTS_NAME)
    save_file({name: value * 1.001 for name, value in weights.items()}, folder / WEIGHTS_NAME)


def calibrate_otherwise(folder: Path) -> None:
    """The same model with another calibration: its verdicts differ."""
    made = Calibrations.load(folder / CALIBRATION_NAME)
    stricter = dataclasses.replace(made.exact, scores=made.exact.scores - 1)
    content = dataclasses.replace(made, exact=stricter).to_bytes()
    (folder / CALIBRATION_NAME).write_bytes(content)


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return changed_copy(tmp_path_factory.mktemp("second") / "bundle", disturb)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It matches its manifest, and cannot be loaded."""

    def damage(folder: Path) -> None:
        disturb(folder)
        (folder / "score.onnx").write_bytes(b"not a graph")

    return changed_copy(tmp_path_factory.mktemp("damaged") / "bundle", damage)


class Load:
    """Several clients that ask without a pause and without a second try.

    Attributes:
        answers: distinct answers to the same request, by model.
        failures: whatever was no answer of status 200.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._stop = threading.Event()
        self.answers: dict[str, set[bytes]] = defaultdict(set)
        self.failures: list[object] = []
        self.count = 0
        self._threads = [threading.Thread(target=self._ask) for _ in range(CLIENTS)]

    def _ask(self) -> None:
        with httpx.Client(timeout=120) as http:
            while not self._stop.is_set():
                try:
                    answer = http.post(f"{self._url}/predictions/score", content=CAT)
                except httpx.HTTPError as error:
                    self.failures.append(error)
                    continue
                if answer.status_code == 200:
                    self.answers[answer.headers["X-Ade-Model"]].add(answer.content)
                else:
                    self.failures.append(answer.text)
                self.count += 1

    @contextmanager
    def running(self) -> Iterator[None]:
        for thread in self._threads:
            thread.start()
        try:
            wait_for(lambda: self.count > CLIENTS, 120)
            yield
        finally:
            self._stop.set()
            for thread in self._threads:
                thread.join(120)

    def check(self, *models: str) -> None:
        assert not self.failures, self.failures[:3]
        assert set(self.answers) == set(models)
        for model, found in self.answers.items():
            (body,) = found  # the same whenever it was asked
            assert json.loads(body)["model"] == model
        assert len(
            {json.loads(min(found))["results"][0]["bpd"] for found in self.answers.values()}
        ) == len(models)


def model_of(url: str) -> str:
    answer = httpx.post(f"{url}/predictions/score", content=CAT, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.headers["X-Ade-Model"]


@pytest.fixture
def app(tmp_path: Path) -> Iterator[RunningApplication]:
    with RunningApplication(tmp_path) as made:
        made.wait()
        yield made
        made.process.terminate()
        made.process.wait(60)


def change(app: RunningApplication, *releases: Release) -> list[str]:
    said: list[str] = []
    message = {"do": CHANGE, "releases": [dataclasses.asdict(one) for one in releases]}
    found = ask(app.control, message, said.append)
    assert [one["number"] for one in found["releases"]] == [one.number for one in releases]
    return said


def test_releases_change_under_load(app: RunningApplication, second: Path, damaged: Path) -> None:
    old, new = release_of(PRETRAINED), release_of(second, number=2)
    (a,), (b,) = old.models, new.models
    load = Load(app.url)
    with load.running():
        # One that cannot start changes nothing.
        with pytest.raises(
            ChannelError, match=r"worker \w+-release9-0 did not start: .*score\.onnx"
        ):
            change(app, release_of(damaged, number=9))
        assert set(load.answers) == {a}
        (app.logs / "score-release9-0.requests.jsonl.1").touch()
        # A canary gets its share.
        assert change(app, old, dataclasses.replace(new, share=0.5)) == [SWITCHED]
        wait_for(lambda: b in load.answers, 60)
        for model in (a, b):
            counted = f'status="200",code="none",bundle="{model}"'
            wait_for(lambda counted=counted: counted in httpx.get(app.metrics).text)
            info = f'ade_info{{model_name="score",worker="0",bundle="{model}"'
            assert info in httpx.get(app.metrics).text
        # A request that names its model is answered by it, whatever the share. The page's do.
        page = Models(app.url, [open_bundle(PRETRAINED)], None).clients["cifar10-av-ade"]
        with AdeClient(app.url, identity=b) as canary, page:
            assert {page.encode([CAT]).model for _ in range(8)} == {a}
            assert {canary.encode([CAT]).model for _ in range(8)} == {b}
        # It takes the place of the first, whose workers end.
        workers = psutil.Process(app.process.pid).children()
        change(app, new)
        assert {model_of(app.url) for _ in range(5)} == {b}
        with AdeClient(app.url, identity=a) as client:
            with pytest.raises(AdeError, match=f"but {b} answers here [(]412 other_model"):
                client.encode([CAT])
            assert client.is_ready()
        wait_for(lambda: sum(is_running(one) for one in workers) == len(workers) // 2)
        assert a not in httpx.get(app.metrics).text
        # And back.
        change(app, dataclasses.replace(old, number=3))
        assert {model_of(app.url) for _ in range(5)} == {a}
    load.check(a, b)
    # The disk does not fill with journals of releases of long ago, or that did not start.
    assert {path.name.removesuffix("-0.requests.jsonl") for path in app.logs.glob("score*")} == {
        "score",
        "score-release2",
        "score-release3",
    }
    kept = json.loads(app.settings.read_text())["releases"]
    assert [one["number"] for one in kept] == [3]  # of a front that is started again
    (running,) = ask(app.control, {"do": DESCRIBE})["releases"]
    assert running["models"] == [a] and set(running["workers"]) == {
        "sample",
        "encode",
        "reconstruct",
        "score",
    }


def test_a_release_returns_while_it_still_answers(app: RunningApplication, second: Path) -> None:
    """A rollback starts workers of its own; those that answer yet are left alone."""
    old, new = release_of(PRETRAINED), release_of(second, number=2)

    def numbers() -> list[int]:
        return [one["number"] for one in ask(app.control, {"do": DESCRIBE})["releases"]]

    with ThreadPoolExecutor() as pool:
        with suspended(app.worker("score")):
            accepted = pool.submit(model_of, app.url)
            wait_for(lambda: app.in_flight() == 1)
            message = {"do": CHANGE, "releases": [dataclasses.asdict(new)]}
            upgraded = pool.submit(ask, app.control, message)
            wait_for(lambda: numbers() == [2], 120)
            assert model_of(app.url) == new.models[0]
            change(app, dataclasses.replace(old, number=3))
            assert model_of(app.url) == old.models[0]
            assert not accepted.done() and not upgraded.done()
        assert accepted.result() == old.models[0]
        assert [one["number"] for one in upgraded.result()["releases"]] == [3]
    wait_for(lambda: len(psutil.Process(app.process.pid).children()) == 4)
    assert model_of(app.url) == old.models[0]


def test_a_canary_that_cannot_answer_does_not_get_all_requests(
    app: RunningApplication, tmp_path: Path
) -> None:
    folder = changed_copy(tmp_path / "second", disturb)
    old, canary = release_of(PRETRAINED), release_of(folder, number=2, share=0.01)
    known = psutil.Process(app.process.pid).children()
    change(app, old, canary)
    (folder / "score.onnx").unlink()
    for worker in psutil.Process(app.process.pid).children():
        if worker not in known:
            worker.kill()
    wait_for(lambda: "score-release2-0 ended" in app.output.read_text(), 60)
    with pytest.raises(
        ChannelError, match=rf"{canary.models[0]} has an operation without a worker"
    ):
        change(app, canary)
    assert change(app, old) == [SWITCHED]
    assert model_of(app.url) == old.models[0]


@pytest.mark.parametrize("changed", [disturb, calibrate_otherwise])
def test_a_worker_does_not_take_what_was_put_into_its_folder(
    tmp_path: Path, changed: Callable[[Path], None]
) -> None:
    """A release is of one model and one calibration, also when a worker is replaced."""
    folder = Path(shutil.copytree(PRETRAINED, tmp_path / "bundle"))
    other = changed_copy(tmp_path / "other", changed)
    with RunningApplication(tmp_path, releases=(dataclasses.asdict(release_of(folder)),)) as app:
        app.wait()
        model = model_of(app.url)
        shutil.rmtree(folder)
        shutil.copytree(other, folder)
        app.worker("sample").kill()
        wait_for(lambda: "has become another bundle" in app.output.read_text(), 60)
        assert model_of(app.url) == model


@pytest.mark.parametrize("changed", [disturb, calibrate_otherwise])
def test_a_front_does_not_take_it_either(tmp_path: Path, changed: Callable[[Path], None]) -> None:
    """It reads the folders again when it is restarted, and would serve it under the old name."""
    folder = Path(shutil.copytree(PRETRAINED, tmp_path / "bundle"))
    release = release_of(folder)
    shutil.rmtree(folder)
    changed_copy(folder, changed)
    unused: Any = None

    async def start() -> None:
        async with build_release(unused, unused, Limits(), release):
            pytest.fail("it was served")

    with pytest.raises(BundleError, match=f"another bundle .* since {release.models[0]}"):
        asyncio.run(start())


def test_only_releases_that_run_are_kept() -> None:
    """One that is not on disk would be gone after a restart, and one that cannot start stays."""
    built, saved = list[int](), list[list[int]]()
    canary, third = (release_of(PRETRAINED, number=number) for number in (2, 3))

    @asynccontextmanager
    async def build(release: Release) -> AsyncIterator[Any]:
        if release is canary:
            raise BundleError("it is gone")
        built.append(release.number)
        yield SimpleNamespace(is_ready=lambda: True)
        built.remove(release.number)

    def save(releases: Sequence[Release]) -> None:
        if third in releases:
            raise OSError(errno.ENOSPC, "No space left on device")
        saved.append([one.number for one in releases])

    async def check() -> None:
        made = Releases[Any](build, save, Limits())
        async with made.run([release_of(PRETRAINED), canary]):
            while not saved:  # the canary is started beside the first
                await asyncio.sleep(0)
            assert saved == [[1]]
            with pytest.raises(OSError, match="No space left"):
                await made.change([third])
            assert [one.number for one, _ in made.backends] == built == [1]

    asyncio.run(check())


def with_manifest(bundle: Bundle, **fields: Any) -> Bundle:
    return Bundle(bundle.folder, {**bundle.manifest, **fields})


def test_the_contract_of_a_new_bundle(tmp_path: Path) -> None:
    old = open_bundle(PRETRAINED)
    other = tmp_path / "other"
    shutil.copytree(PRETRAINED, other, copy_function=os.symlink)
    (other / MANIFEST_NAME).unlink()
    (other / MANIFEST_NAME).write_text(json.dumps({**old.manifest, "name": "other"}))
    check_contract(old, open_bundle(other))
    without = {k: v for k, v in old.manifest["files"].items() if k != CALIBRATION_NAME}
    for new, message in (
        (with_manifest(old, image_shape=[64, 64, 3]), r"images of .* the shape \(64, 64, 3\)"),
        (with_manifest(old, latent_shapes=[[1, 2, 2]]), r"latents of .* \[\(1, 2, 2\)\]"),
        (with_manifest(old, operations=["sample"]), "has no encode, reconstruct, score"),
        (with_manifest(old, files=without), "is not calibrated"),
    ):
        with pytest.raises(UpgradeError, match=message):
            check_contract(old, new)
    for path in PRETRAINED.iterdir():
        (tmp_path / path.name).symlink_to(path)
    new = open_bundle(tmp_path)
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "night.npz").touch()
    with pytest.raises(UpgradeError, match="lacks the calibrations night"):
        check_contract(new, old)
    # What feedback made of the old bundle's own calibration has a successor: the new one's own. A
    # calibration on other images has none.
    calibrations = Calibrations.load(PRETRAINED / CALIBRATION_NAME)
    exact = calibrations.exact
    assert exact is not None
    default = dataclasses.replace(calibrations, name="default", model=old.networks)
    (tmp_path / FOLDER / "night.npz").unlink()
    write_calibrations(tmp_path, default)
    check_contract(new, old)
    others = dataclasses.replace(exact, fitted_digests=exact.fitted_digests + np.uint64(1))
    write_calibrations(tmp_path, dataclasses.replace(default, exact=others))
    with pytest.raises(UpgradeError, match="--name default") as refused:
        check_contract(new, old)
    assert "remove" not in str(refused.value)  # the old one's decides now
    # Bundles of earlier versions have no digests; feedback keeps the density.
    grid = exact.normal.grid + np.float32(1)
    moved = dataclasses.replace(exact, normal=dataclasses.replace(exact.normal, grid=grid))
    write_calibrations(tmp_path, dataclasses.replace(default, exact=moved))
    with pytest.raises(UpgradeError, match="--name default"):
        check_contract(new, old)
    # The running service still decides by what it read of a file that is damaged now.
    path_of(tmp_path, "default").write_bytes(b"damaged")
    with pytest.raises(UpgradeError, match="--name default"):
        check_contract(new, old)
    # Nor has one whose bundle has no calibration of its own.
    gone = dict(old.manifest["files"])
    del gone[CALIBRATION_NAME]
    with pytest.raises(UpgradeError, match="--name default"):
        check_contract(with_manifest(new, files=gone), old)
    # A calibration on few images would give no verdict at the usual alpha.
    few = dataclasses.replace(
        exact,
        scores=exact.scores[:60],
        reference=exact.reference[:60],
        digests=exact.digests[:60],
    )
    write_calibrations(tmp_path, dataclasses.replace(default, exact=few))
    with pytest.raises(UpgradeError, match="default of .* has 60 images, too few .* at alpha 0.01"):
        check_contract(old, new)
    fewer = dataclasses.replace(
        few, scores=few.scores[:50], reference=few.reference[:50], digests=few.digests[:50]
    )
    write_calibrations(other, dataclasses.replace(default, exact=fewer))
    check_contract(new, open_bundle(other))  # as before, none at 0.01
    (tmp_path / FOLDER / "default.npz").unlink()
    (tmp_path / FOLDER / "night.npz").touch()
    # A file that the new bundle could not use is no calibration: images would get no verdict.
    with pytest.raises(UpgradeError, match="the calibration night of "):
        check_contract(old, new)
    for model, is_usable in ((old.networks, True), ("0" * 64, False), (old.networks, True)):
        write_calibrations(tmp_path, dataclasses.replace(calibrations, name="night", model=model))
        with nullcontext() if is_usable else pytest.raises(UpgradeError, match="for a model with"):
            check_contract(old, new)
    # Nor is one of another version, which would take the place of the bundle's own.
    unknown = dataclasses.replace(exact, names=(exact.names[0], "unknown", *exact.names[2:]))
    made = dataclasses.replace(calibrations, name="default", model=old.networks)
    write_calibrations(tmp_path, dataclasses.replace(made, exact=unknown))
    with pytest.raises(UpgradeError, match="the calibration default of .*unknown"):
        check_contract(old, new)
    # One without resized images does not replace one with them, be it the bundle's own.
    write_calibrations(tmp_path, dataclasses.replace(made, resized=None))
    with pytest.raises(UpgradeError, match="the calibration default of .* gives resized images no"):
        check_contract(old, new)
    (tmp_path / FOLDER / "night.npz").unlink()
    check_contract(new, old)
    # The calibrations of an old bundle whose folder has gone or changed cannot be compared.
    said: list[str] = []
    check_contract(new, old, None, said.append)
    assert said == []
    check_contract(Bundle(tmp_path / "gone", old.manifest), new, None, said.append)
    changed_since = {**without, CALIBRATION_NAME: "0" * 64}
    check_contract(with_manifest(old, files=changed_since), new, None, said.append)
    gone, changed = said
    assert gone.startswith("warning: the folder of ")
    assert gone.endswith("is gone: its calibrations cannot be compared")
    assert "cannot be compared: " in changed and "does not match the manifest" in changed


class SwitchingEngine(UpgradableEngine):
    """An engine that switches at once; ``changes`` collects the releases of each change."""

    def __init__(self) -> None:
        self.changes: list[Sequence[Release]] = []

    def change(self, releases: Sequence[Release], say: Callable[[str], None]) -> None:
        self.changes.append(releases)
        say(SWITCHED)

    def releases(self) -> list[dict[str, Any]]:
        return [{"number": one.number} for one in self.changes[-1]] if self.changes else []


def at_once(bundles: Sequence[str]) -> AbstractContextManager[Callable[[], None]]:
    """The page of other bundles, in the place of :meth:`Page.prepared`."""
    return nullcontext(lambda: None)


def upgrades_of(
    engine: Any,
    *folders: Path,
    prepared: Callable[..., Any] = at_once,
    memory: Path | None = None,
) -> Upgrades:
    """The upgrades of a service of these bundles."""
    plan: Any = SimpleNamespace(
        bundles=[open_bundle(folder) for folder in folders],
        release=release_of(*folders),
        memory=memory,
    )
    page: Any = SimpleNamespace(prepared=prepared)
    return Upgrades(plan, engine, page, lambda: None)


def test_an_upgrade_keeps_the_bundle_that_a_link_led_to(second: Path, tmp_path: Path) -> None:
    """The next upgrade may move the link; a rollback does not follow it either."""
    engine = SwitchingEngine()
    upgrades = upgrades_of(engine, PRETRAINED)
    link = tmp_path / "link"
    for folder in (second, PRETRAINED):
        link.unlink(missing_ok=True)
        link.symlink_to(folder)
        upgrades.handle({"do": UPGRADE, "bundle": str(link)}, lambda text: None)
    found = upgrades.handle({"do": ROLLBACK}, lambda text: None)
    assert found["current"] == (open_bundle(second).model_id,)
    assert [Path(*release.bundles) for (release,) in engine.changes] == [
        second.resolve(),
        PRETRAINED.resolve(),
        second.resolve(),
    ]


def with_default(folder: Path) -> Path:
    """A copy of the shipped bundle with a ``default.npz``, which is its own calibration."""
    folder.mkdir()
    for path in PRETRAINED.iterdir():
        (folder / path.name).symlink_to(path)
    own = Calibrations.load(PRETRAINED / CALIBRATION_NAME)
    networks = open_bundle(PRETRAINED).networks
    write_calibrations(folder, dataclasses.replace(own, name="default", model=networks))
    return folder


def test_a_default_that_has_vanished_with_its_folder_is_missed(
    second: Path, tmp_path: Path
) -> None:
    """Otherwise the bundle's own calibration would decide, or that of the next one."""
    old, new = (with_default(tmp_path / name) for name in ("old", "new"))
    engine, memory, said = SwitchingEngine(), tmp_path / "memory", list[str]()
    upgrades = upgrades_of(engine, old, memory=memory)
    served = open_bundle(old)
    open_calibrations(served, old / FOLDER, seen_file(served, memory))  # as a worker of it does
    (old / FOLDER / "default.npz").rename(tmp_path / "default.npz")
    for folder in ("unmounted", None):  # the file alone, and its folder
        with pytest.raises(UpgradeError, match="no calibration in the place of .*default.npz"):
            upgrades.handle({"do": UPGRADE, "bundle": str(second)}, lambda text: None)
        if folder is not None:
            (old / FOLDER).rename(tmp_path / folder)
    assert engine.changes == []
    upgrades.handle({"do": UPGRADE, "bundle": str(new)}, lambda text: None)
    # Going back is urgent; workers give no verdict there.
    upgrades.handle({"do": ROLLBACK}, said.append)
    assert any(f"{old / FOLDER} is gone" in text for text in said)
    upgrades.handle({"do": UPGRADE, "bundle": str(new)}, lambda text: None)
    with pytest.raises(UpgradeError, match="calibrations is gone"):
        upgrades.handle({"do": UPGRADE, "bundle": str(old)}, lambda text: None)
    # Another bundle that takes the folder over never had one, but the one that is served does.
    manifest = json.loads((old / MANIFEST_NAME).read_text())
    (old / MANIFEST_NAME).unlink()
    (old / MANIFEST_NAME).write_text(json.dumps({**manifest, "made_by": "another"}))
    upgrades.handle({"do": UPGRADE, "bundle": str(old)}, lambda text: None)
    assert [Path(*release.bundles) for (release,) in engine.changes] == [new, old, new, old]
    # A bundle that was only looked at is remembered of nothing.
    assert [path.name for path in memory.iterdir()] == [seen_file(served, memory).name]


def test_a_folder_that_cannot_be_listed_may_hold_a_default(
    second: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as one whose rights were changed: its workers give no verdict."""
    old = with_default(tmp_path / "old")
    path_of(old, "default").unlink()
    listdir = os.listdir

    def refuse(folder: Any = ".") -> list[str]:
        if Path(folder).name == FOLDER:
            raise PermissionError(13, "Permission denied")
        return listdir(folder)

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(UpgradeError, match="no calibration in the place of"):
        check_contract(open_bundle(old), open_bundle(second))
    monkeypatch.undo()
    (old / FOLDER).rename(tmp_path / "mounted")
    (old / FOLDER).symlink_to(tmp_path / "unmounted")
    with pytest.raises(UpgradeError, match="no calibration in the place of"):
        check_contract(open_bundle(old), open_bundle(second))


def test_of_several_bundles_the_one_of_the_same_name_is_replaced(
    second: Path, tmp_path: Path
) -> None:
    other, third = (
        with_calibrations(PRETRAINED, tmp_path / name, lambda its: its, name)
        for name in ("other", "third")
    )
    engine = SwitchingEngine()
    upgrades = upgrades_of(engine, other, PRETRAINED)
    names = "other, cifar10-av-ade, got third"
    with pytest.raises(UpgradeError, match=f"must have the name of one of them, {names}"):
        upgrades.handle({"do": UPGRADE, "bundle": str(third)}, lambda text: None)
    assert engine.changes == []
    found = upgrades.handle({"do": UPGRADE, "bundle": str(second)}, lambda text: None)
    ((release,),) = engine.changes
    assert release.bundles == (str(other), str(second))
    assert found["current"] == release.models == release_of(other, second).models


def test_a_canary_of_the_model_that_is_served_is_refused(tmp_path: Path) -> None:
    """Nothing would tell its figures from those of the other."""
    engine = SwitchingEngine()
    upgrades = upgrades_of(engine, PRETRAINED)
    same = changed_copy(tmp_path / "same", calibrate_otherwise)
    message = {"do": UPGRADE, "bundle": str(same), "canary": 0.05}
    with pytest.raises(UpgradeError, match=r"is served already: .* could not be distinguished"):
        upgrades.handle(message, lambda text: None)
    assert engine.changes == [] and upgrades.describe()["canary"] is None


def test_an_engine_that_cannot_upgrade_says_which_can(second: Path) -> None:
    upgrades = upgrades_of(SimpleNamespace(), PRETRAINED)
    with pytest.raises(UpgradeError, match="use ade serve --engine asgi, or start a second"):
        upgrades.handle({"do": UPGRADE, "bundle": str(second)}, lambda text: None)
    assert upgrades.describe()["current"] == release_of(PRETRAINED).models


def test_a_page_that_cannot_start_leaves_the_old_bundle(second: Path) -> None:
    starts = iter([LaunchError("the page of the new bundle does not start"), None])

    def prepared(bundles: Sequence[str]) -> AbstractContextManager[Callable[[], None]]:
        if (error := next(starts)) is not None:
            raise error
        return at_once(bundles)

    engine, message = SwitchingEngine(), {"do": UPGRADE, "bundle": str(second)}
    upgrades = upgrades_of(engine, PRETRAINED, prepared=prepared)
    with pytest.raises(LaunchError, match="the page of the new bundle"):
        upgrades.handle(message, lambda text: None)
    assert engine.changes == [] and upgrades.describe()["commands"][-1]["state"] == "failed"
    assert upgrades.describe()["current"] == release_of(PRETRAINED).models
    assert upgrades.handle(message, lambda text: None)["current"] == release_of(second).models


def test_a_rollback_does_not_wait_for_requests_of_the_former_release(second: Path) -> None:
    old, new = release_of(PRETRAINED), release_of(second)
    may_start, may_end = threading.Event(), threading.Event()

    class DrainingEngine(SwitchingEngine):
        def change(self, releases: Sequence[Release], say: Callable[[str], None]) -> None:
            is_first = not self.changes
            if is_first:
                assert may_start.wait(60)
            super().change(releases, say)
            if is_first:
                assert may_end.wait(60)
                raise ChannelError("the front ended, and was started again with other releases")

    engine, said = DrainingEngine(), list[str]()
    upgrades = upgrades_of(engine, PRETRAINED)
    message = {"do": UPGRADE, "bundle": str(second)}
    with ThreadPoolExecutor() as pool:
        upgraded = pool.submit(upgrades.handle, message, said.append)
        try:
            wait_for(lambda: any(text.startswith("starting") for text in said))
            with pytest.raises(UpgradeError, match="another upgrade is in progress"):
                upgrades.handle({"do": ROLLBACK}, said.append)
            (last,) = upgrades.handle({"do": "describe"}, said.append)["commands"]
            assert (last["command"], last["state"]) == (f"ade upgrade {second}", "in progress")
            assert last["detail"] == said[-1]
            may_start.set()
            wait_for(lambda: "finishes its own" in said[-1])
            found = upgrades.handle({"do": ROLLBACK}, lambda text: None)
            assert (found["current"], found["previous"]) == (old.models, new.models)
            assert not upgraded.done() and "has stopped" not in said[-1]
            states = {one["command"]: one["state"] for one in found["commands"]}
            assert states == {f"ade upgrade {second}": "in progress", "ade rollback": "done"}
        finally:
            may_start.set()
            may_end.set()
        assert upgraded.result()["current"] == old.models
        assert [one["state"] for one in upgraded.result()["commands"]] == ["done", "done"]
    assert said[-1] == f"{PRETRAINED} ({old.models[0]}) has stopped"
    assert [release.number for (release,) in engine.changes] == [2, 3]
    upgrades.handle({"do": ROLLBACK}, lambda text: None)  # nothing is left in progress


def test_a_failure_is_known_although_the_client_has_left(
    second: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Such as after Ctrl-C, or after a lost connection of SSH."""
    plan: Any = SimpleNamespace(
        bundles=[open_bundle(PRETRAINED)], release=release_of(PRETRAINED), memory=None
    )
    page: Any = None
    has_left = threading.Event()

    class FailingEngine(SwitchingEngine):
        def change(self, releases: Sequence[Release], say: Callable[[str], None]) -> None:
            assert has_left.wait(60)
            raise ChannelError("the worker did not start:\nno memory")

    upgrades = Upgrades(plan, FailingEngine(), page, lambda: None)
    listener = Listener(tmp_path / "control.sock", upgrades.handle, (UpgradeError,))
    with connect(tmp_path / "control.sock") as client:
        message = {"do": UPGRADE, "bundle": str(second), "canary": 0.05}
        client.sendall(json.dumps(message).encode() + b"\n")
        assert b"verifying" in client.recv(2**16)
    has_left.set()
    wait_for(lambda: "in progress" not in str(upgrades.describe()["commands"]))
    listener.close()
    with upgrades._busy:  # until the command has ended
        pass
    with pytest.raises(UpgradeError, match="nothing to go back to"):
        upgrades.handle({"do": ROLLBACK}, lambda text: None)
    last, refused = upgrades.describe()["commands"]
    assert (refused["command"], refused["state"]) == ("ade rollback", "failed")
    assert last["state"] == "failed"
    reason = f"{PRETRAINED} ({open_bundle(PRETRAINED).model_id}) stays: the worker did not start:"
    assert last["detail"] == f"{reason}\nno memory"
    (line,) = _releases({"releases": {"commands": [last]}, "by_bundle": None})
    command = f"ade upgrade {second} --canary 0.05"
    shown = f"upgrade     {last['began']} {command}: failed: {reason}\n            no memory"
    assert line == shown
    assert f"{command} failed: {reason}" in capfd.readouterr().err


def test_the_contract_is_checked_whenever_a_bundle_takes_over(tmp_path: Path) -> None:
    """A calibration may be added while a canary runs, or after an upgrade."""
    old, new = tmp_path / "old" / "bundle", tmp_path / "new" / "bundle"
    shutil.copytree(PRETRAINED, old)
    changed_copy(new, disturb)
    a, b = open_bundle(old), open_bundle(new)
    engine = SwitchingEngine()
    upgrades, said = upgrades_of(engine, old), list[str]()

    def do(what: str, **arguments: Any) -> dict[str, Any]:
        return upgrades.handle({"do": what, **arguments}, said.append)

    def calibrate(bundle: Bundle, name: str) -> None:
        made = Calibrations.load(PRETRAINED / CALIBRATION_NAME)
        write_calibrations(
            bundle.folder, dataclasses.replace(made, name=name, model=bundle.networks)
        )

    assert do("upgrade", bundle=str(new), canary=0.5)["canary"] == (b.model_id,)
    assert do("describe")["canary_is_lost"] is False
    engine.changes.append([release_of(old)])  # the front was started again, without it
    assert do("describe")["canary_is_lost"] is True
    engine.changes.pop()
    calibrate(a, "night")
    with pytest.raises(UpgradeError, match="lacks the calibrations night"):
        do("finish")
    assert do("describe")["canary"] == (b.model_id,)
    calibrate(b, "night")
    assert do("finish")["current"] == (b.model_id,)
    # Going back is urgent: it warns.
    calibrate(b, "noon")
    assert do("rollback")["current"] == (a.model_id,)
    (warning,) = [text for text in said if text.startswith("warning")]
    assert "lacks the calibrations noon" in warning
    # Not to a folder that holds something else than was served, be it of the same weights.
    fields = {key: value for key, value in b.manifest.items() if key != "files"}
    write_manifest(new, {**fields, "notes": "another calibration"})
    assert open_bundle(new).model_id == b.model_id
    with pytest.raises(UpgradeError, match="has other files now"):
        do("rollback")


def test_a_change_that_the_front_refuses_is_not_taken_for_done(tmp_path: Path) -> None:
    """Although its settings have the new releases already."""
    release = release_of(PRETRAINED)

    def refuse(message: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
        raise BundleError("an error after the settings were written")

    engine: Any = Asgi.__new__(Asgi)
    engine._control, engine._settings = tmp_path / "front.sock", tmp_path / "front.json"
    engine._settings.write_text(json.dumps({"releases": [dataclasses.asdict(release)]}))
    listener, said = Listener(engine._control, refuse, (BundleError,)), list[str]()
    with pytest.raises(ChannelError, match="an error after"):
        engine.change([release], said.append)
    listener.close()
    assert said == []


def connect(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(path))
    return connection


def test_the_private_channel(tmp_path: Path) -> None:
    def handle(message: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
        if message["do"] == "fail":
            raise BundleError("the reason")
        if message["do"] == "break":
            raise RuntimeError("not for clients")
        if message["do"] == "miscount":
            raise ValueError("not a message that cannot be read")
        say("first")
        say("second")
        return message

    path, said = tmp_path / "control.sock", list[str]()
    with pytest.raises(ChannelError, match="No such file"):
        ask(path, {})
    listener = Listener(path, handle, (BundleError,))
    assert path.stat().st_mode & 0o777 == 0o600
    assert ask(path, {"do": "it"}, said.append) == {"do": "it"} and said == ["first", "second"]
    with pytest.raises(ChannelError, match=r"^the reason$"):
        ask(path, {"do": "fail"})

    def closed(line: str) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):  # of standard output, not of the socket
        ask(path, {"do": "it"}, closed)
    for what in ("break", "miscount"):
        with pytest.raises(ChannelError, match="internal error"):
            ask(path, {"do": what})
    with connect(path) as connection:
        connection.sendall(b"{\n")
        assert b"cannot be read" in connection.recv(1000)
    listener.close()
    with pytest.raises(ChannelError, match="refused"):
        ask(path, {"do": "it"})


def test_a_process_without_free_file_descriptors_answers_later(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    before, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    listener = Listener(path, lambda message, say: {}, ())
    with socket.socket(socket.AF_UNIX) as early, socket.socket(socket.AF_UNIX):
        # Sockets get the lowest free numbers: none is left below the limit.
        resource.setrlimit(resource.RLIMIT_NOFILE, (early.fileno() + 2, most))
        try:
            early.connect(str(path))
            time.sleep(0.2)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (before, most))
        assert ask(path, {"do": "it"}, seconds=5) == {}
    listener.close()


@pytest.mark.parametrize(
    "line, seconds, message", [(b"", 0.2, "within 0.2 s"), (b"{\n", 30, "cannot be read")]
)
def test_a_process_that_hangs_or_babbles_gives_no_answer(
    line: bytes, seconds: float, message: str, tmp_path: Path
) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "control.sock"))
        listening.listen()

        def answer() -> None:
            accepted, _ = listening.accept()
            with accepted:
                accepted.sendall(line)
                is_asked.wait(10)

        is_asked = threading.Event()
        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(ChannelError, match=message):
            ask(tmp_path / "control.sock", {"do": "describe"}, seconds=seconds)
        is_asked.set()
        thread.join()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_user_gets_no_answer() -> None:
    """Neither where the files' modes would let it."""
    handled: list[object] = []
    folder = Path(tempfile.mkdtemp())
    path = folder / "control.sock"
    listener = Listener(path, lambda message, say: handled.append(message) or {}, ())

    def attack() -> str:
        try:
            ask(path, {"do": "upgrade"})
        except ChannelError as error:
            return str(error)
        return "answered"

    def attack_without_check() -> str:
        with socket.socket(socket.AF_UNIX) as connection, suppress(OSError):
            connection.connect(str(path))
            connection.sendall(b'{"do": "upgrade"}\n')
            return connection.recv(100).decode()
        return ""

    try:
        assert "Permission denied" in str(as_nobody(attack))
        folder.chmod(0o755)
        path.chmod(0o666)
        assert "another user listens" in str(as_nobody(attack))
        assert as_nobody(attack_without_check) == ""
        assert handled == []
    finally:
        listener.close()
        shutil.rmtree(folder)


@dataclass(frozen=True)
class Ended:
    """What a command returned and printed."""

    status: int
    out: str
    err: str


@pytest.fixture
def ade(
    served: RunningService, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Ended]:
    """Runs the command line for that service, in this process."""
    for name, value in served.variables.items():
        monkeypatch.setenv(name, value)

    def run(*words: str) -> Ended:
        capsys.readouterr()
        status = main([*words])
        return Ended(status, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def served() -> Iterator[RunningService]:
    running = RunningService(
        PRETRAINED, options=("--engine", "asgi", "--workers", "1"), timeout=500
    )
    yield running
    running.stop()


@pytest.mark.slow
def test_upgrade_canary_and_rollback(
    served: RunningService,
    ade: Callable[..., Ended],
    second: Path,
    damaged: Path,
    tmp_path: Path,
) -> None:
    a, b = open_bundle(PRETRAINED).model_id, open_bundle(second).model_id
    mismatched = Path(shutil.copytree(PRETRAINED, tmp_path / "mismatched"))
    with open(mismatched / WEIGHTS_NAME, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\1")
    page = served.pids["page"]
    load = Load(served.url)
    with load.running():
        for words, message in (
            (("upgrade", str(mismatched)), "does not match the manifest"),
            (("upgrade", str(tmp_path / "none")), "is not a bundle"),
            (("upgrade", "--finish"), "there is no canary"),
            (("rollback",), "nothing to go back to"),
            (("upgrade", str(damaged), "--canary", "5%"), f"({a}) stays: worker"),
        ):
            refused = ade(*words)
            assert refused.status == 2 and message in refused.err, refused
        assert set(load.answers) == {a} and served.pids["page"] == page
        failed = f"ade upgrade {damaged} --canary 0.05: failed: "
        assert failed in ade("status").out and f"{damaged} --canary" in ade("status", "--json").out

        canary = ade("upgrade", str(second), "--canary", "30%")
        assert canary.status == 0 and f"({b}) answers 0.3 of the requests" in canary.out, canary
        wait_for(lambda: b in load.answers, 120)
        status = ade("status")
        assert f"canary      {b}, 0.3 of the requests" in status.out, status
        assert status.out.count("ms on average") == 2
        again = ade("upgrade", str(second))
        assert again.status == 2 and "is a canary" in again.err
        finished = ade("upgrade", "--finish")
        assert finished.status == 0 and f"({b}) answers all requests" in finished.out
        assert model_of(served.url) == b and served.pids["page"] != page
        assert httpx.get(f"{served.page}/readyz", timeout=120).status_code == 200

        back = ade("rollback")
        assert back.status == 0 and f"({a}) answers all requests" in back.out, back
        assert model_of(served.url) == a
    load.check(a, b)
    assert len(served.workers()) == 4


@pytest.mark.slow
def test_a_service_that_is_killed_during_an_upgrade_leaves_no_process(second: Path) -> None:
    running = RunningService(
        PRETRAINED, options=("--engine", "asgi", "--workers", "1"), timeout=500
    )
    few = len(running.workers())
    folder = running.folder.path
    client = subprocess.Popen(
        [sys.executable, "-m", "ade_cli.main", "upgrade", str(second)],
        cwd=ROOT,
        env={**os.environ, **running.variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: len(running.workers()) > few, 300)
    family = running.descendants()
    running.process.send_signal(signal.SIGKILL)
    running.process.wait(10)
    _, alive = psutil.wait_procs(family, timeout=20)
    _, errors = client.communicate(timeout=30)
    assert not alive and client.returncode == 2 and "ended before it answered" in errors
    deadline = time.monotonic() + 5
    while folder.exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
