"""Calibrations are added, replaced and removed under load; a damaged one is reported."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from ade_base.ports import VARIABLES
from ade_client.client import AdeClient, AdeError
from serving.engine.bundle import CALIBRATION_NAME, open_bundle
from serving.gate import Gate
from serving.verdict.calibration_file import Calibrations
from serving.verdict.store import FOLDER, path_of
from tests.helpers import PRETRAINED, ROOT, wait_for
from tests.service import RunningService

pytestmark = pytest.mark.slow
CLIENTS = 16
LEAST_S, MOST_S = 12.0, 120.0  # of load: until every version has answered
IMAGES = 4


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[RunningService, Path, list[Path]]]:
    """A service, its bundle, and files of two versions of a calibration."""
    folder = tmp_path_factory.mktemp("swap")
    bundle = Path(shutil.copytree(PRETRAINED, folder / "bundle"))
    own = Calibrations.load(bundle / CALIBRATION_NAME)
    networks = open_bundle(bundle).networks
    assert own.exact is not None
    files = []
    for step in (2, 3):
        few = dataclasses.replace(
            own.exact, scores=own.exact.scores[::step], reference=own.exact.reference[::step]
        )
        files.append(folder / f"{step}.npz")
        files[-1].write_bytes(dataclasses.replace(own, exact=few, model=networks).to_bytes())
    (bundle / FOLDER).mkdir()
    service = RunningService(bundle)
    yield service, bundle, files
    service.stop()


def put(file: Path, bundle: Path, name: str) -> None:
    target = path_of(bundle, name)
    shutil.copy(file, target.with_name(".new"))
    os.replace(target.with_name(".new"), target)


def test_swaps_under_load_fail_no_request(
    served: tuple[RunningService, Path, list[Path]], real_images: np.ndarray
) -> None:
    """Every answer has the p-values of the version that it names."""
    service, bundle, files = served
    images = real_images[:IMAGES]
    expected = {}
    for file in files:
        put(file, bundle, "night")
        decisions = Gate(bundle, 0.1).check(images, "night")
        assert decisions[0].calibration is not None
        expected[decisions[0].calibration["version"]] = [d.p_value for d in decisions]
    own = Gate(bundle, 0.1).check(images)
    assert own[0].calibration is not None
    expected[own[0].calibration["version"]] = [d.p_value for d in own]
    assert len({tuple(values) for values in expected.values()}) == 3
    stop, seen, wrong = threading.Event(), Counter[str](), list[object]()
    answers = Counter[int]()  # by client

    def load(number: int) -> None:
        try:
            ask(number)
        except Exception as error:
            wrong.append(error)

    def ask(number: int) -> None:
        name = ("night", "day", "default")[number % 3]
        with AdeClient(service.url, retries=0) as client:
            while not stop.is_set():
                try:
                    found = client.score(images, alpha=0.1, calibration=name, explain=False)
                except AdeError as error:
                    if (error.status, error.code, name) != (422, "unknown_calibration", "day"):
                        raise
                    seen["unknown"] += 1
                else:
                    label = found[0].calibration  # type: ignore[union-attr]
                    if label.name != name or expected[label.version] != [r.p_value for r in found]:
                        wrong.append((label, found))
                    seen[f"{name} {label.version}"] += 1
                answers[number] += 1

    threads = [threading.Thread(target=load, args=(i,)) for i in range(CLIENTS)]
    for thread in threads:
        thread.start()
    started, turn = time.monotonic(), 0

    def all_seen() -> bool:
        kinds = Counter(key.split()[0] for key in seen)
        return kinds["night"] == 2 and kinds["day"] > 0 and seen["unknown"] > 0

    try:
        while time.monotonic() - started < LEAST_S or (
            not all_seen() and time.monotonic() - started < MOST_S
        ):
            put(files[turn % 2], bundle, "night")
            if turn % 3 == 2:
                path_of(bundle, "day").unlink()
            elif turn % 3 == 0:
                put(files[turn % 2], bundle, "day")
            turn += 1
            time.sleep(1.3)  # longer than the time between two readings of the folder
        before = answers.copy()
        wait_for(lambda: wrong or all(answers[i] > before[i] for i in range(CLIENTS)), 120)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not wrong, wrong[:3]
    assert all_seen(), seen


def test_a_damaged_file_is_reported_and_what_was_read_stays(
    served: tuple[RunningService, Path, list[Path]], real_images: np.ndarray
) -> None:
    service, bundle, files = served
    put(files[0], bundle, "night")
    version = Calibrations.load(files[0]).version
    images = real_images[:IMAGES]
    environment = {
        **os.environ,
        **{VARIABLES[name][0]: str(port) for name, port in service.ports.items()},
    }

    def status(*words: str) -> str:
        command = [sys.executable, "-m", "ade_cli.main", "status", *words]
        return subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True
        ).stdout

    with AdeClient(service.url) as client:

        def is_current() -> bool:
            try:
                (found,) = client.score(images[:1], calibration="night")
            except AdeError as error:
                assert error.code == "unknown_calibration"
                return False
            return found.calibration.version == version  # type: ignore[union-attr]

        def every_worker_has_read_it() -> bool:
            text = httpx.get(f"{service.metrics}/metrics").text
            found = re.findall(r'calibration_version\{[^}]*="night"[^}]*\} (\S+)', text)
            num_workers = text.count('ade_info{model_name="score",')
            return len(found) == num_workers and set(map(float, found)) == {int(version, 16)}

        wait_for(is_current)
        wait_for(every_worker_has_read_it)
        path_of(bundle, "night").write_bytes(b"damaged")

        def broken() -> set[str]:
            text = httpx.get(f"{service.metrics}/metrics").text
            pattern = r'ade_gate_calibration_broken\{[^}]*calibration="(\w+)"[^}]*\} 1'
            return set(re.findall(pattern, text))

        wait_for(lambda: broken() == {"night"})
        assert is_current()
        client.score(images, alpha=0.1, calibration="night")
        wait_for(lambda: "its file cannot be used" in status())
        found = json.loads(status("--json"))["calibrations"]["night"]
        assert found["broken"] and found["expected"] > 0
        logs = Path(str((service.folder.read_description() or {})["logs"]))
        assert "calibration night cannot be used" in (logs / "torchserve.log").read_text()
        put(files[0], bundle, "night")
        wait_for(lambda: not broken())
        with pytest.raises(AdeError, match="there are .*night") as unknown:
            client.score(images, calibration="dusk")
        assert (unknown.value.status, unknown.value.code) == (422, "unknown_calibration")
