"""What to install, and the command that installs it."""

from __future__ import annotations

import importlib.util
import json
import shlex
import sys
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote

PROJECT = "av-ade"


def say_what_to_install(verb: str, error: ModuleNotFoundError, extra: str | None) -> None:
    """Print which package is missing and the command that installs it.

    Raises:
        ModuleNotFoundError: the missing module is our own, which is a bug.
    """
    package = str(error.name).partition(".")[0]
    if (Path(__file__).parents[1] / package).is_dir():
        raise error
    print(
        f"ade {verb}: the package {package} is not installed. Install what ade {verb} needs:\n"
        + install_command([runtime(), *([extra] if extra else [])]),
        file=sys.stderr,
    )


def install_command(extras: list[str]) -> str:
    """The command that adds extras to this environment. Those of uv have no pip."""
    if extras == ["cpu", "process"]:
        extras = ["serve"]
    python = shlex.quote(sys.executable)
    has_pip = importlib.util.find_spec("pip") is not None
    pip = f"{python} -m pip install" if has_pip else f"uv pip install --python {python}"
    return f"{pip} {requirement(extras)}"


def runtime() -> str:
    """The extra with the ONNX Runtime that is installed, else ``cpu``; they exclude each other."""
    return "cuda" if "onnxruntime-gpu" in installed() else "cpu"


def installed() -> dict[str, str]:
    """The version of each package of this environment."""
    found = metadata.distributions()
    return {str(each.name).lower().replace("_", "-"): each.version for each in found}


def requirement(extras: list[str]) -> str:
    """This project with extras, for pip; from a folder or file if it was installed from one."""
    listed = f"[{','.join(extras)}]"
    source = json.loads(metadata.distribution(PROJECT).read_text("direct_url.json") or "{}")
    url = str(source.get("url", ""))
    path = unquote(url.removeprefix("file://"))
    # The image of the Dockerfile no longer has the folder, but pip knows what is installed.
    if not url.startswith("file://") or not Path(path).exists():
        return shlex.quote(PROJECT + listed)
    editable = "--editable " if source.get("dir_info", {}).get("editable") else ""
    return editable + shlex.quote(path + listed)
