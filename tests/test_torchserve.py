"""TorchServe as a pool, and its handler by itself."""

import json
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from handlers.launch.engines import ENGINES
from handlers.processes.channel import ChannelError, ask
from handlers.service.control import DESCRIBE
from handlers.service.options import ServingOptions
from handlers.service.worker import WorkerSettings
from handlers.torchserve.archives import write_archive
from serving.engine.bundle import open_bundle
from tests.helpers import PRETRAINED, b64, suspended, wait_for
from tests.test_process import RunningApplication, is_running, release_of
from tests.test_publish import CAT, Load, changed_copy, disturb, model_of, publish


def test_an_archive_answers_in_a_torchserve_of_ones_own(tmp_path, monkeypatch):
    """Without a pool: image files come in, JSON goes out, and each has its own status."""
    from ts.context import RequestProcessor
    from ts.model_loader import TsModelLoader

    bundle = open_bundle(PRETRAINED)
    given = (str(PRETRAINED), bundle.model_id, bundle.digest, "score", "score", "score-0", "logs")
    (store := tmp_path / "store").mkdir()
    write_archive(WorkerSettings(*given, ServingOptions(device="cpu")), store, 1)
    folder = tmp_path / "unpacked"
    with zipfile.ZipFile(store / "score.mar") as archive:
        archive.extractall(folder)
    monkeypatch.setenv("LOG_LOCATION", str(tmp_path / "logs"))
    monkeypatch.syspath_prepend(folder)
    service = TsModelLoader().load("score", str(folder), "entry.py", None, 8)

    def answers(*requests):
        context, count = service.context, range(len(requests))
        context.request_ids = {i: f"id-{i}" for i in count}
        context.request_processor = [RequestProcessor({"Content-Type": t}) for t, _ in requests]
        found = service._entry_point([{"body": body} for _, body in requests], context)
        types = [context.get_response_content_type(i) for i in count]
        statuses = [context.get_response_status(i)[0] for i in count]
        return list(zip(statuses, types, map(json.loads, found), strict=True))

    image, other, parsed = answers(
        ("image/png", bytearray(CAT)), ("", b"junk"), ("application/json", {"images": [b64(CAT)]})
    )
    assert image[:2] == (200, "application/json") and image[2]["model"] == bundle.model_id
    assert (other[0], other[2]["error"]["code"]) == (415, "not_an_image")
    assert parsed == image  # TorchServe reads JSON itself


@pytest.fixture
def app(tmp_path):
    with RunningApplication(tmp_path, pool=ENGINES["torchserve"].code) as made:
        made.wait()
        yield made
        family = psutil.Process(made.process.pid).children(recursive=True)
        with ThreadPoolExecutor(1) as pool:  # a stop answers what was accepted
            with suspended(worker(made, "encode")):
                accepted = made.begin(pool, "encode")
                made.process.terminate()
                time.sleep(0.5)
            assert accepted.result().status_code == 200
        assert made.process.wait(60) == 0
        wait_for(lambda: not any(map(is_running, family)))
    assert "Traceback" not in made.output.read_text(), made.output.read_text()


def worker(app, name):
    (found,) = ask(app.control, {"do": DESCRIBE})["workers"][name]["workers"]
    return psutil.Process(found["pid"])


@pytest.mark.slow
def test_releases_change_under_load(app, tmp_path):
    """Each has a TorchServe; the former one ends when it has answered what it accepted."""
    second = changed_copy(tmp_path / "second", disturb)
    damaged = changed_copy(
        tmp_path / "damaged", lambda folder: (folder / "score.onnx").write_bytes(b"no graph")
    )
    old, new = release_of(PRETRAINED), release_of(second, number=2)
    load = Load(app.url)
    with load.running():
        with pytest.raises(ChannelError, match=r"worker \w+-release9-0 did not start: .*score"):
            publish(app, release_of(damaged, number=9))
        before = psutil.Process(app.process.pid).children(recursive=True)
        publish(app, new)
        assert {model_of(app.url) for _ in range(5)} == set(new.models)
        wait_for(lambda: not any(map(is_running, before)), 60)
    load.check(*old.models, *new.models)
    assert sorted(path.name for path in tmp_path.glob("r[0-9]")) == ["r2"]


def test_what_ends_is_started_again(app):
    """A worker takes only its batch along; without TorchServe itself, requests wait."""
    with ThreadPoolExecutor(1) as pool:
        first = worker(app, "score")
        with suspended(first):
            lost = app.begin(pool, "score")
            assert app.post("encode", CAT).status_code == 200
            first.kill()
        assert (lost.result().status_code, lost.result().headers["retry-after"]) == (503, "1")
        assert app.post("score", CAT).status_code == 200  # waits for the next worker
        assert worker(app, "score").pid != first.pid
    (java,) = psutil.Process(app.process.pid).children()
    java.kill()
    wait_for(lambda: not ask(app.control, {"do": DESCRIBE})["workers"]["score"]["workers"])
    assert app.post("score", CAT).status_code == 200
