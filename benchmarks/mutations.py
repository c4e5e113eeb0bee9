"""Breaks guards of the product one by one, and tells whether a test notices.

In a temporary copy of the working tree, each guard's line is replaced by one that lets everything
through, and the file of tests that should fail is run. Run it before and after tests are removed,
and ``make test`` first: a test that always fails would count, too.

    python -m benchmarks.mutations [GUARD ...]

It ends with status 1 if a broken guard goes unnoticed, or if a guard's text is not found exactly
once: it has moved then, and its line in the table below must follow it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FAILED = 1  # pytest's exit code if tests ran and some failed


@dataclass(frozen=True)
class Guard:
    """A line that guards, and what tests it.

    Attributes:
        name: for the command line.
        file: of the product.
        text: occurs there exactly once.
        broken: takes its place.
        tests: file of tests of which at least one should fail.
    """

    name: str
    file: str
    text: str
    broken: str
    tests: str


GUARDS = [
    Guard(
        "token",
        "serving/api/guard.py",
        "not hmac.compare_digest(given.strip().encode(), token.encode())",
        "not given",
        "tests/test_guard.py",
    ),
    Guard(
        "host",
        "serving/api/guard.py",
        'if host != "localhost" and host not in allowed_hosts and not is_address(host):',
        "if False:",
        "tests/test_guard.py",
    ),
    Guard(
        "origin",
        "serving/api/guard.py",
        "or not all(is_same_origin(origin, host, allowed_hosts) for origin in origins)",
        "",
        "tests/test_guard.py",
    ),
    Guard(
        "body limit",
        "handlers/front/admission.py",
        "if len(body) > limits.body_bytes:",
        "if False:",
        "tests/test_front.py",
    ),
    Guard(
        "pixel limit",
        "ade_base/pictures/read.py",
        "if width * height > limit:",
        "if False:",
        "tests/test_images.py",
    ),
    Guard(
        "memory of the sandbox",
        "ade_base/pictures/decoder_process.py",
        "resource.setrlimit(resource.RLIMIT_AS, (used + memory_bytes, used + memory_bytes))",
        "pass",
        "tests/test_decoders.py",
    ),
    Guard(
        "time of the sandbox",
        "ade_base/pictures/decoder_process.py",
        "signal.setitimer(signal.ITIMER_PROF, cpu_seconds * structure.effort)",
        "signal.setitimer(signal.ITIMER_PROF, 0)",
        "tests/test_decoders.py",
    ),
    Guard(
        "digest of a bundle's file",
        "serving/engine/bundle.py",
        'if found != self.manifest["files"][name]:',
        "if False:",
        "tests/test_bundle.py",
    ),
    Guard(
        "path in a manifest",
        "serving/engine/bundle.py",
        'if Path(name).name != name or name in ("", ".", ".."):',
        "if False:",
        "tests/test_bundle.py",
    ),
    Guard(
        "unlisted calibration",
        "serving/engine/bundle.py",
        "if unlisted:",
        "if False:",
        "tests/test_fails_closed.py",
    ),
    Guard(
        "size of a calibration's arrays",
        "serving/verdict/calibration_file.py",
        "if size > MAX_CALIBRATION_BYTES:",
        "if False:",
        "tests/test_calibrations.py",
    ),
    Guard(
        "range of alpha",
        "serving/verdict/decision.py",
        "if not 0 < alpha <= 1:",
        "if alpha <= 0:",
        "tests/test_fails_closed.py",
    ),
    Guard(
        "threshold",
        "serving/verdict/decision.py",
        '"reject" if p_value <= alpha',
        '"reject" if p_value < alpha',
        "tests/test_fails_closed.py",
    ),
    Guard(
        "p-value that is not a number",
        "serving/verdict/decision.py",
        "if p_value is None or not math.isfinite(p_value):",
        "if p_value is None:",
        "tests/test_fails_closed.py",
    ),
    Guard(
        "too few calibration images",
        "serving/verdict/decision.py",
        "if alpha < calibration.smallest_p_value:",
        "if False:",
        "tests/test_fails_closed.py",
    ),
    Guard(
        "path of a page's file",
        "serving/page/files.py",
        "if not is_regular or not resolved.is_relative_to(Path(folder).resolve()):",
        "if False:",
        "tests/test_page_security.py",
    ),
    Guard(
        "size in a zip",
        "serving/page/contents.py",
        "if max(info.file_size, len(data)) > MAX_FILE_BYTES:",
        "if False:",
        "tests/test_page_contents.py",
    ),
    Guard(
        "digests at publish",
        "handlers/launch/publish.py",
        "import Bundle, BundleError, verify_bundle",
        "import Bundle, BundleError, open_bundle as verify_bundle",
        "tests/test_publish.py",
    ),
    Guard(
        "release that did not start",
        "handlers/service/release.py",
        "await next_one.stack.aclose()",
        "pass",
        "tests/test_publish.py",
    ),
    Guard(
        "mode of the working folder",
        "handlers/processes/run_folder.py",
        "if found.st_mode & 0o022:",
        "if False:",
        "tests/test_supervision.py",
    ),
]


def is_noticed(guard: Guard, copy: Path) -> str:
    """Break a guard in a copy of the tree, run its tests and mend it; returns what to print."""
    path = copy / guard.file
    whole = path.read_text()
    if whole.count(guard.text) != 1:
        return f"MOVED: {guard.text!r} is in {guard.file} {whole.count(guard.text)} times"
    path.write_text(whole.replace(guard.text, guard.broken))
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-rfE", "-p", "no:cacheprovider", guard.tests],
            cwd=copy,
            env={**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
        )
    finally:
        path.write_text(whole)
    if done.returncode == FAILED:
        failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        return f"noticed by {failed[0].split()[1] if failed else guard.tests}"
    return f"NOT NOTICED by {guard.tests}: pytest ended with {done.returncode}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Break guards, and tell whether a test notices.")
    parser.add_argument("guards", nargs="*", help=f"of: {', '.join(g.name for g in GUARDS)}")
    chosen = set(parser.parse_args().guards) or {guard.name for guard in GUARDS}
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    is_good = True
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        copy = Path(folder)
        for name in filter(None, names.split("\0")):
            if (ROOT / name).is_file():
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, copy / name)
        for guard in GUARDS:
            if guard.name in chosen:
                found = is_noticed(guard, copy)
                is_good &= found.startswith("noticed")
                print(f"{guard.name}: {found}", flush=True)
    sys.exit(not is_good)


if __name__ == "__main__":
    main()
