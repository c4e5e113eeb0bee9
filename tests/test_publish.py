"""Bundles are replaced while a service runs: no request fails, no answer is of two models."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import json
import os
import re
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
from concurrent.futures import ThreadPoolExecutor
from contextlib import (
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
import psutil
import pytest
from safetensors.numpy import load_file, save_file

from ade_cli.main import main
from ade_cli.status import _publishing
from ade_client.client import AdeClient, AdeError
from handlers.front.admission import Limits
from handlers.launch.launcher import Launcher
from handlers.launch.publish import Publisher, PublishError, check_contract
from handlers.processes.channel import ChannelError, Listener, ask
from handlers.processes.run_folder import RunFolder
from handlers.service.application import ApplicationSettings, build_release
from handlers.service.control import DESCRIBE, PUBLISH
from handlers.service.release import CurrentRelease, Release
from serving.api.journal import last_errors
from serving.engine.bundle import (
    CALIBRATION_NAME,
    WEIGHTS_NAME,
    Bundle,
    BundleError,
    open_bundle,
    write_manifest,
)
from serving.page.models import Models
from serving.verdict.calibration_file import CalibrationPair
from tests.helpers import PRETRAINED, ROOT, suspended, wait_for, with_calibrations
from tests.service import RunningService
from tests.test_process import RunningApplication, is_running, release_of
from tests.test_security import as_nobody

CLIENTS = 3
CAT = (ROOT / "serving" / "examples" / "cat.png").read_bytes()


def changed_copy(target, change):
    """The shipped bundle with changed files, and a manifest that matches them."""
    shutil.copytree(PRETRAINED, target)
    change(target)
    fields = {key: value for key, value in open_bundle(target).manifest.items() if key != "files"}
    write_manifest(target, fields)
    return target


def disturb(folder):
    """Another model: its answers differ."""
    weights = load_file(folder / WEIGHTS_NAME)
    save_file({name: value * 1.001 for name, value in weights.items()}, folder / WEIGHTS_NAME)


def calibrate_otherwise(folder):
    """The same model with another calibration: its verdicts differ."""
    made = CalibrationPair.load(folder / CALIBRATION_NAME)
    stricter = dataclasses.replace(made.exact, scores=made.exact.scores - 1)
    content = dataclasses.replace(made, exact=stricter).to_bytes()
    (folder / CALIBRATION_NAME).write_bytes(content)


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    return changed_copy(tmp_path_factory.mktemp("second") / "bundle", disturb)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """It matches its manifest, and cannot be loaded."""

    def damage(folder):
        disturb(folder)
        (folder / "score.onnx").write_bytes(b"not a graph")

    return changed_copy(tmp_path_factory.mktemp("damaged") / "bundle", damage)


class Load:
    """Several clients that ask without a pause and without a second try.

    Attributes:
        answers: distinct answers to the same request, by model.
        failures: whatever was no answer of status 200.
    """

    def __init__(self, url):
        self._url = url
        self._stop = threading.Event()
        self.answers: dict[str, set[bytes]] = defaultdict(set)
        self.failures: list[object] = []
        self.count = 0
        self._threads = [threading.Thread(target=self._ask) for _ in range(CLIENTS)]

    def _ask(self):
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
    def running(self):
        for thread in self._threads:
            thread.start()
        try:
            wait_for(lambda: self.count > CLIENTS, 120)
            yield
        finally:
            self._stop.set()
            for thread in self._threads:
                thread.join(120)

    def check(self, *models):
        assert not self.failures, self.failures[:3]
        assert set(self.answers) == set(models)
        for model, found in self.answers.items():
            (body,) = found  # the same whenever it was asked
            assert json.loads(body)["model"] == model
        assert len(
            {json.loads(min(found))["results"][0]["bpd"] for found in self.answers.values()}
        ) == len(models)


def model_of(url):
    answer = httpx.post(f"{url}/predictions/score", content=CAT, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.headers["X-Ade-Model"]


@pytest.fixture
def app(tmp_path):
    with RunningApplication(tmp_path) as made:
        made.wait()
        yield made
        made.process.terminate()
        made.process.wait(60)


def publish(app, release):
    found = ask(app.control, {"do": PUBLISH, "release": dataclasses.asdict(release)})
    assert found["number"] == release.number


def test_releases_change_under_load(app, second, damaged):
    old, new = release_of(PRETRAINED), release_of(second, number=2)
    (a,), (b,) = old.models, new.models
    load = Load(app.url)
    with load.running():
        # One that cannot start changes nothing.
        with pytest.raises(
            ChannelError, match=r"worker \w+-release9-0 did not start: .*score\.onnx"
        ):
            publish(app, release_of(damaged, number=9))
        assert set(load.answers) == {a}
        (app.logs / "score-release9-0.requests.jsonl.1").touch()
        # Another one takes the place of the first, whose workers end.
        workers = psutil.Process(app.process.pid).children()
        publish(app, new)
        assert {model_of(app.url) for _ in range(5)} == {b}
        counted = f'status="200",code="none",bundle="{b}"'
        wait_for(lambda: counted in httpx.get(app.metrics).text)
        assert (
            f'ade_info{{model_name="score",worker="0",bundle="{b}"' in httpx.get(app.metrics).text
        )
        # A request that names its model is answered by it, or not at all. The page's do.
        page = Models(app.url, [open_bundle(second)], None).clients["cifar10-av-ade"]
        with page, AdeClient(app.url, identity=a) as client:
            assert {page.encode([CAT]).model for _ in range(8)} == {b}
            with pytest.raises(AdeError, match=f"but {b} answers here [(]412 other_model"):
                client.encode([CAT])
            assert client.is_ready()
        wait_for(lambda: not any(is_running(one) for one in workers))
        assert a not in httpx.get(app.metrics).text
        # And back.
        publish(app, dataclasses.replace(old, number=3))
        assert {model_of(app.url) for _ in range(5)} == {a}
    load.check(a, b)
    # The disk does not fill with journals of releases of long ago, or that did not start.
    assert {path.name.removesuffix("-0.requests.jsonl") for path in app.logs.glob("score*")} == {
        "score",
        "score-release2",
        "score-release3",
    }
    # Of a front that is started again.
    assert json.loads(app.settings.read_text())["release"]["number"] == 3
    running = ask(app.control, {"do": DESCRIBE})
    assert running["models"] == [a] and set(running["workers"]) == {
        "sample",
        "encode",
        "reconstruct",
        "score",
    }


def test_a_release_returns_while_it_still_answers(app, second):
    """Going back starts workers of its own; those that answer yet are left alone.

    A stop ends a release that still drains, when it has answered.
    """
    old, new = release_of(PRETRAINED), release_of(second, number=2)
    with ThreadPoolExecutor() as pool:
        with suspended(app.worker("score")):
            accepted = pool.submit(model_of, app.url)
            wait_for(lambda: app.in_flight() == 1)
            publish(app, new)
            assert model_of(app.url) == new.models[0]
            publish(app, dataclasses.replace(old, number=3))
            assert model_of(app.url) == old.models[0]
            assert not accepted.done()
        assert accepted.result() == old.models[0]
    wait_for(lambda: len(psutil.Process(app.process.pid).children()) == 4)
    assert model_of(app.url) == old.models[0]
    with ThreadPoolExecutor() as pool:
        with suspended(app.worker("score-release3")):
            accepted = pool.submit(app.post, "score")
            wait_for(lambda: app.in_flight() == 1)
            publish(app, dataclasses.replace(new, number=4))
            workers = psutil.Process(app.process.pid).children()
            app.process.terminate()
            time.sleep(0.5)
        assert accepted.result().status_code == 200
    assert app.process.wait(60) == 0
    wait_for(lambda: not any(is_running(one) for one in workers))


def test_a_release_that_cannot_be_saved_does_not_answer():
    """It would be gone after a restart of the front."""
    built = list[int]()

    @asynccontextmanager
    async def build(release):
        built.append(release.number)
        yield SimpleNamespace()
        built.remove(release.number)

    def save(release):
        raise OSError(errno.ENOSPC, "No space left on device")

    async def check():
        made = CurrentRelease[Any](build, save, Limits())
        async with made.run(release_of(PRETRAINED)):
            with pytest.raises(OSError, match="No space left"):
                await made.publish(release_of(PRETRAINED, number=2))
            assert [made.release.number] == built == [1]

    asyncio.run(check())


def test_a_worker_does_not_take_what_was_put_into_its_folder(tmp_path):
    """A release is of one model and one calibration, also when a worker is replaced.

    Starts that fail are counted: waiting clients may leave before they are answered, so that
    nothing else would count.
    """
    folder = Path(shutil.copytree(PRETRAINED, tmp_path / "bundle"))
    other = changed_copy(tmp_path / "other", calibrate_otherwise)
    with RunningApplication(tmp_path, release=dataclasses.asdict(release_of(folder))) as app:
        app.wait()
        model = model_of(app.url)
        shutil.rmtree(folder)
        shutil.copytree(other, folder)
        app.worker("sample").kill()
        wait_for(lambda: "has become another bundle" in app.output.read_text(), 60)
        assert model_of(app.url) == model
        pattern = r'ade_worker_starts_total\{model_name="sample",.*\} (\S+)'
        wait_for(lambda: float(re.findall(pattern, httpx.get(app.metrics).text)[0]) >= 3, 60)
        assert not app.is_ready()
        shutil.rmtree(folder)
        shutil.copytree(PRETRAINED, folder)
        wait_for(app.is_ready, 60)


@pytest.mark.parametrize("changed", [disturb, calibrate_otherwise])
def test_a_front_does_not_take_it_either(tmp_path, changed):
    """It reads the folders again when it is restarted, and would serve it under the old name."""
    folder = Path(shutil.copytree(PRETRAINED, tmp_path / "bundle"))
    release = release_of(folder)
    shutil.rmtree(folder)
    changed_copy(folder, changed)
    unused: Any = None

    async def start():
        async with build_release(unused, unused, Limits(), release):
            pytest.fail("it was served")

    with pytest.raises(BundleError, match=f"another bundle .* since {release.models[0]}"):
        asyncio.run(start())


def with_manifest(bundle, **fields):
    return Bundle(bundle.folder, {**bundle.manifest, **fields})


def with_calibration(target, name, made):
    """The shipped bundle with a calibration, its own if it has no name."""
    shutil.copytree(PRETRAINED, target)
    (target / ("calibration.npz" if name is None else f"calibration-{name}.npz")).write_bytes(
        made.to_bytes()
    )
    write_manifest(target, open_bundle(PRETRAINED).manifest)
    return open_bundle(target)


def test_the_contract_of_a_new_bundle(tmp_path):
    old = open_bundle(PRETRAINED)
    check_contract(old, with_manifest(old, name="other"))
    without = {k: v for k, v in old.manifest["files"].items() if k != CALIBRATION_NAME}
    for new, message in (
        (with_manifest(old, image_shape=[64, 64, 3]), r"images of .* the shape \(64, 64, 3\)"),
        (with_manifest(old, latent_shapes=[[1, 2, 2]]), r"latents of .* \[\(1, 2, 2\)\]"),
        (with_manifest(old, operations=["sample"]), "has no encode, reconstruct, score"),
        (with_manifest(old, files=without), "is not calibrated"),
    ):
        with pytest.raises(PublishError, match=message):
            check_contract(old, new)
    made = CalibrationPair.load(PRETRAINED / CALIBRATION_NAME)
    exact = made.exact
    assert exact is not None
    night = with_calibration(tmp_path / "night", "night", made)
    check_contract(old, night)
    with pytest.raises(PublishError, match="lacks the calibrations night"):
        check_contract(night, old)

    def of_images(count):
        few = dataclasses.replace(
            exact,
            scores=exact.scores[:count],
            reference=exact.reference[:count],
            digests=exact.digests[:count],
        )
        return dataclasses.replace(made, exact=few)

    # A calibration on few images would give no verdict at the usual alpha.
    few = with_calibration(tmp_path / "few", None, of_images(60))
    with pytest.raises(PublishError, match="default of .* has 60 images, too few .* at alpha 0.01"):
        check_contract(old, few)
    check_contract(few, with_calibration(tmp_path / "fewer", None, of_images(50)))
    # One of another version could not be used: images would get no verdict.
    unknown = dataclasses.replace(exact, names=(exact.names[0], "unknown", *exact.names[2:]))
    other = with_calibration(tmp_path / "other", "noon", dataclasses.replace(made, exact=unknown))
    with pytest.raises(PublishError, match="the calibration of .*unknown"):
        check_contract(old, other)
    # One without resized images does not replace one with them.
    bare = dataclasses.replace(made, resized=None)
    unresized = with_calibration(tmp_path / "unresized", None, bare)
    with pytest.raises(PublishError, match="the calibration default of .* gives resized images no"):
        check_contract(old, unresized)
    check_contract(unresized, old)
    # The calibrations of an old bundle whose folder has gone or changed cannot be compared.
    said: list[str] = []
    check_contract(Bundle(tmp_path / "gone", old.manifest), old, said.append)
    changed_since = {**without, CALIBRATION_NAME: "0" * 64}
    check_contract(with_manifest(old, files=changed_since), old, said.append)
    gone, changed = said
    assert "cannot be compared: " in gone and "is missing" in gone
    assert "cannot be compared: " in changed and "does not match the manifest" in changed


class SwitchingEngine:
    """An engine that switches at once; ``published`` collects the releases."""

    def __init__(self):
        self.published: list[Release] = []

    def publish(self, release):
        self.published.append(release)

    def describe(self):
        return {"workers": {}}


def publisher_of(engine, *folders):
    """The publisher of a service of these bundles."""
    plan: Any = SimpleNamespace(
        bundles=[open_bundle(folder) for folder in folders], release=release_of(*folders)
    )
    page: Any = SimpleNamespace(show=lambda bundles: None)
    return Publisher(plan, engine, page, lambda: None)


def publishing(publisher, folder, said=None):
    say = (said if said is not None else []).append
    return publisher.handle({"do": "publish", "bundle": str(folder)}, say)


def test_a_link_is_followed_once(second, tmp_path):
    """It may be moved before the next bundle is published."""
    engine = SwitchingEngine()
    publisher = publisher_of(engine, PRETRAINED)
    link = tmp_path / "link"
    for folder in (second, PRETRAINED):
        link.unlink(missing_ok=True)
        link.symlink_to(folder)
        found = publishing(publisher, link)
        assert found["models"] == (open_bundle(folder).model_id,)
    assert [Path(*release.bundles) for release in engine.published] == [
        second.resolve(),
        PRETRAINED.resolve(),
    ]


def test_going_back_warns_of_what_clients_lose(tmp_path):
    """It is urgent; another bundle is refused for the same reason."""
    made = CalibrationPair.load(PRETRAINED / CALIBRATION_NAME)
    night = with_calibration(tmp_path / "night", "night", made)
    noon = with_calibration(tmp_path / "noon", "noon", made)
    engine, said = SwitchingEngine(), list[str]()
    publisher = publisher_of(engine, PRETRAINED)
    publishing(publisher, night.folder)
    with pytest.raises(PublishError, match="lacks the calibrations night"):
        publishing(publisher, noon.folder)
    publishing(publisher, PRETRAINED, said)
    (warning,) = [text for text in said if text.startswith("warning")]
    assert "lacks the calibrations night" in warning
    assert [release.number for release in engine.published] == [2, 3]


def test_of_several_bundles_the_one_of_the_same_name_is_replaced(second, tmp_path):
    other, third = (
        with_calibrations(PRETRAINED, tmp_path / name, lambda its: its, name)
        for name in ("other", "third")
    )
    engine = SwitchingEngine()
    publisher = publisher_of(engine, other, PRETRAINED)
    names = "other, cifar10-av-ade, got third"
    with pytest.raises(PublishError, match=f"must have the name of one of them, {names}"):
        publishing(publisher, third)
    assert engine.published == []
    found = publishing(publisher, second)
    (release,) = engine.published
    assert release.bundles == (str(other), str(second))
    assert found["models"] == release.models == release_of(other, second).models


def test_a_bundle_that_does_not_match_its_manifest_starts_nothing(tmp_path):
    changed = Path(shutil.copytree(PRETRAINED, tmp_path / "changed"))
    with open(changed / WEIGHTS_NAME, "ab") as file:
        file.write(b"\0")
    publisher = publisher_of(engine := SwitchingEngine(), PRETRAINED)
    with pytest.raises(BundleError, match="does not match the manifest"):
        publishing(publisher, changed)
    assert engine.published == []


def test_a_failure_is_known_although_the_client_has_left(second, tmp_path, capfd):
    """Such as after Ctrl-C, or after a lost connection of SSH."""
    has_left = threading.Event()

    class FailingEngine(SwitchingEngine):
        def publish(self, release):
            assert has_left.wait(60)
            raise ChannelError("the worker did not start:\nno memory")

    publisher = publisher_of(FailingEngine(), PRETRAINED)
    listener = Listener(tmp_path / "control.sock", publisher.handle, (PublishError,))
    with connect(tmp_path / "control.sock") as client:
        message = {"do": "publish", "bundle": str(second)}
        client.sendall(json.dumps(message).encode() + b"\n")
        assert b"verifying" in client.recv(2**16)
    with pytest.raises(PublishError, match="another bundle is being published"):
        publishing(publisher, second)
    assert publisher.describe()["last"]["state"] == "in progress"
    has_left.set()
    wait_for(lambda: publisher.describe()["last"]["state"] != "in progress")
    listener.close()
    last = publisher.describe()["last"]
    assert last["state"] == "failed"
    reason = f"{PRETRAINED} ({open_bundle(PRETRAINED).model_id}) stays: the worker did not start:"
    assert last["detail"] == f"{reason}\nno memory"
    (line,) = _publishing(last)
    command = f"ade publish {second}"
    shown = f"publish     {last['began']} {command}: failed: {reason}\n            no memory"
    assert line == shown
    assert f"{command} failed: {reason}" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("kept", "is_refusal", "is_done"), [(2, True, False), (2, False, True), (1, False, False)]
)
def test_a_front_that_ends_while_it_publishes(kept, is_refusal, is_done, tmp_path):
    """It is started again, with the new release if its settings have it. A refusal is final."""
    release = release_of(PRETRAINED, number=2)

    def refuse(message, say):
        raise BundleError("an error after the settings were written")

    engine: Any = Launcher.__new__(Launcher)
    engine._folder, engine._settings = RunFolder(tmp_path), tmp_path / "front.json"
    ApplicationSettings(
        **{
            field.name: None
            for field in dataclasses.fields(ApplicationSettings)
            if field.name != "release"
        },
        release=dataclasses.asdict(release_of(PRETRAINED, number=kept)),
    ).save(engine._settings)
    if is_refusal:
        listener = Listener(engine._folder.front_socket, refuse, (BundleError,))
    with nullcontext() if is_done else pytest.raises(ChannelError):
        engine.publish(release)
    if is_refusal:
        listener.close()


def connect(path):
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(path))
    return connection


def test_the_private_channel(tmp_path):
    def handle(message, say):
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

    def closed(line):
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


def test_a_process_without_free_file_descriptors_answers_later(tmp_path):
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
def test_a_process_that_hangs_or_babbles_gives_no_answer(line, seconds, message, tmp_path):
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "control.sock"))
        listening.listen()

        def answer():
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
def test_another_user_gets_no_answer():
    """Neither where the files' modes would let it."""
    handled: list[object] = []
    folder = Path(tempfile.mkdtemp())
    path = folder / "control.sock"
    listener = Listener(path, lambda message, say: handled.append(message) or {}, ())

    def attack():
        try:
            ask(path, {"do": "upgrade"})
        except ChannelError as error:
            return str(error)
        return "answered"

    def attack_without_check():
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
def ade(served, monkeypatch, capsys):
    """Runs the command line for that service, in this process."""
    for name, value in served.variables.items():
        monkeypatch.setenv(name, value)

    def run(*words):
        capsys.readouterr()
        status = main([*words])
        return Ended(status, *capsys.readouterr())

    return run


@pytest.fixture
def served(tmp_path):
    options = ("--engine", "process", "--workers", "1", "--logs", str(tmp_path / "logs"))
    running = RunningService(PRETRAINED, options=options, timeout=500)
    yield running
    running.stop()


@pytest.mark.slow
def test_publish_and_back_and_a_kill_meanwhile(served, ade, second, damaged, tmp_path):
    a, b = open_bundle(PRETRAINED).model_id, open_bundle(second).model_id
    page = served.pids["page"]
    load = Load(served.url)
    with load.running():
        for folder, message in (
            (tmp_path / "none", "is not a bundle"),
            (damaged, f"({a}) stays: worker"),
        ):
            refused = ade("publish", str(folder))
            assert refused.status == 2 and message in refused.err, refused
        assert set(load.answers) == {a} and served.pids["page"] == page
        assert f"ade publish {damaged}: failed: " in ade("status").out
        assert str(damaged) in json.loads(ade("status", "--json").out)["publishing"]["command"]

        published = ade("publish", str(second))
        assert published.status == 0 and f"({b}) answers all requests" in published.out, published
        assert model_of(served.url) == b and served.pids["page"] != page
        assert httpx.get(f"{served.page}/readyz", timeout=120).status_code == 200
        back = ade("publish", str(PRETRAINED))
        assert back.status == 0 and f"({a}) answers all requests" in back.out, back
        assert model_of(served.url) == a
    load.check(a, b)
    wait_for(lambda: len(served.workers()) == 4)
    # Logs are kept in the folder that is given.
    answer = httpx.post(f"{served.url}/predictions/sample", json={"n": 0}, timeout=60)
    assert answer.status_code == 422
    assert last_errors(tmp_path / "logs")[-1]["operation"] == "sample"
    assert (tmp_path / "logs" / "front.out").exists()
    kill_while_it_publishes(served, second)


def kill_while_it_publishes(running, second):
    """Kill a service; no process may be left, and no folder."""
    few = len(running.workers())
    folder = running.folder.path
    client = subprocess.Popen(
        [sys.executable, "-m", "ade_cli.main", "publish", str(second)],
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
