"""The words of code, docs and templates: some that this project once used are replaced for good."""

import re
from pathlib import Path

from tests.helpers import ROOT

FOLDERS = (
    "ade_base", "ade_cli", "ade_client", "ade_model", "benchmarks", "deploy", "docs", "export",
    "extensions", "fitting", "handlers", "serving", "tests", "training",
)  # fmt: skip
FILES = ("CHANGELOG.md", "CONTRIBUTING.md", "Dockerfile", "Makefile", "README.md", "pyproject.toml")
SUFFIXES = {".py", ".md", ".html", ".js", ".css", ".yml", ".yaml", ".conf", ".json", ".ipynb"}
RECORDS = 200_000  # bytes; larger files are recorded figures
THINGS = "array|bytes|entry|file|images|levels|line|ms|one|pixels|process|row|score|thread|values"
UNITS = "core|image|level|model|process|request|side|tab|tenant|verb|worker"

# A pattern, and what to write instead.
REPLACED = {
    r"strange|strangers?": "out-of-distribution, or unusual",
    r"spoilt": "corrupted",
    r"go(es)? on|anew": "resumes, restarts, again",
    r"that is none|(?<![Tt]here )is no (image|text|JSON|number)": "is invalid, is not an image",
    rf"({THINGS}) an? ({UNITS})": "per image, per level",
    r"all is well|is it well|gone wrong": "healthy, no error, broken",
    r"to the byte": "byte-identical",
}


def texts():
    found = [ROOT / name for name in FILES]
    for folder in FOLDERS:
        found += (path for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES)
    own = Path(__file__).resolve()
    return [path for path in found if path.stat().st_size < RECORDS and path.resolve() != own]


def test_replaced_words_are_not_used():
    patterns = {re.compile(rf"\b({p})\b"): use for p, use in REPLACED.items()}
    wrong = []
    for path in texts():
        for number, line in enumerate(path.read_text().splitlines(), 1):
            for pattern, instead in patterns.items():
                wrong += (
                    f"{path.relative_to(ROOT)}:{number}: {found[0]!r}: write {instead}"
                    for found in pattern.finditer(line)
                )
    assert not wrong, "\n".join(wrong)
