"""Builds the wheel, and serves from it alone."""

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile

import pytest

from ade_base.ports import VARIABLES
from tests.helpers import PRETRAINED, ROOT
from tests.service import RunningService
from tests.test_docker import HEALTH

MAX_MIB = 55


def build(kind, source, folder):
    """A wheel or an sdist, by setuptools of this environment, as ``python -m build`` calls it."""
    script = f"import setuptools.build_meta as b, sys; b.build_{kind}(sys.argv[1])"
    folder.mkdir()
    command = [sys.executable, "-W", "ignore", "-c", script, folder]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The files that git knows: those of a former build must not get into a wheel."""
    folder = tmp_path_factory.mktemp("tree")
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory):
    return build("wheel", tree, tmp_path_factory.mktemp("wheel") / "built")


def test_the_wheel_is_small_and_has_the_bundle_but_no_tests(wheel):
    assert wheel.stat().st_size < MAX_MIB * 2**20
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        for file in PRETRAINED.iterdir():
            assert archive.read(f"pretrained/cifar10/{file.name}") == file.read_bytes()
    assert not [name for name in names if re.search(r"(^|/)(tests|benchmarks)/", name)]


@pytest.mark.slow
def test_an_sdist_builds_the_same_wheel(tree, wheel, tmp_path):
    sdist = build("sdist", tree, tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    again = build("wheel", tmp_path / sdist.name.removesuffix(".tar.gz"), tmp_path / "wheel")
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(again) as two:
        sums = [{file.filename: file.CRC for file in each.infolist()} for each in (one, two)]
    assert sums[0] == sums[1]


def test_the_wheel_alone_serves_in_an_empty_folder(wheel, tmp_path):
    """Without an argument. Dependencies are shared."""
    venv.create(tmp_path / "venv")
    python, folder = tmp_path / "venv" / "bin" / "python", tmp_path / "empty"
    folder.mkdir()
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    subprocess.run([*pip, "--no-index", "--no-deps", wheel], check=True)
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    options = ("--host", "0.0.0.0", "--device", "cpu", "--engine", "process", "--workers", "1")
    running = RunningService(options=options, python=str(python), folder=folder)
    try:
        assert re.match(
            "starting cifar10-.*@.* on the CPU, with --engine process", running.output[0]
        )
        (line,) = [one for one in running.output if "curl" in one and "/score" in one]
        assert str(site) in line
        done = subprocess.run(["sh", "-ec", line], check=True, capture_output=True, text=True)
        assert '"decision":"accept"' in done.stdout.replace(" ", "")
        port = {VARIABLES["ui"][0]: str(running.ports["ui"])}
        subprocess.run([python, *HEALTH[1:]], check=True, env=os.environ | port)
    finally:
        assert running.stop() == []
