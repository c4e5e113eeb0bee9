"""Every error that users see is a UserError, and ``ade`` shows it without a traceback."""

import ast
import builtins

import pytest

from ade_base.errors import ConfigError, UserError
from ade_base.extensions import FOLDER
from ade_cli.main import main
from tests.house import product_files

CLASSES = [
    (node.name, {ast.unparse(base).rpartition(".")[2] for base in node.bases})
    for path in product_files()
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.ClassDef)
]
BUILTIN = {
    name
    for name, value in vars(builtins).items()
    if isinstance(value, type) and issubclass(value, BaseException)
}
OTHERS = {  # what becomes of them instead
    "AdeError": "for programs: the client raises it",
    "ClientGone": "nobody is left who could read it",
    "FileRefused": "an answer of the page",
    "ImageError": "an ApiError, or a file that is left out and named",
    "NotFinite": "the result of one image",
    "RequestRefused": "an answer of the page",
    "ShapeError": "a bug",
    "TookTooLong": "for programs: the gate raises it",
    "WorkerError": "in the log of the front",
}
OTHERS_OF_EXTENSIONS = {
    "codec": {
        "Damaged": "of a chunk: ade decompress names the images that are lost",
        "NotCoded": "the image is stored without the model",
    },
    "ray": {
        "Unhealthy": "Ray replaces the replica",
    },
}


def with_subclasses(names):
    while more := {name for name, bases in CLASSES if bases & names} - names:
        names = names | more
    return names


def test_every_error_is_a_users_or_never_reaches_one():
    errors, users = with_subclasses(BUILTIN), with_subclasses({"UserError"})
    assert len(users) > 25  # the walk finds them
    others = {name for name, bases in CLASSES if bases & errors and not bases & users}
    # One that begins with an underscore is caught in its own module.
    expected = {*OTHERS, "UserError"}
    for extension, names in OTHERS_OF_EXTENSIONS.items():
        if (FOLDER / extension).exists():
            expected |= set(names)
    assert {name for name in others if not name.startswith("_")} == expected


def fail_with(error, monkeypatch):
    def run(args):
        raise error

    monkeypatch.setattr("ade_cli.score.run", run)
    return main(["score", "x.png", "--bundle", "x"])


@pytest.mark.parametrize("kind", [UserError, ConfigError])
def test_an_error_of_a_user_is_one_line(kind, monkeypatch, capsys):
    assert fail_with(kind("alpha must be below 1, got 2"), monkeypatch) == 2
    assert capsys.readouterr().err == "ade score: --alpha must be below 1, got 2\n"


@pytest.mark.parametrize("kind", [ValueError, RuntimeError, KeyError])
def test_a_bug_is_a_traceback(kind, monkeypatch):
    with pytest.raises(kind):
        fail_with(kind("x"), monkeypatch)
