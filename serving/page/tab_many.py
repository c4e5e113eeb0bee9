"""The tab *Score many*: a table of files, judged together."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
from PIL import Image

from ade_base.brand import percent, rounded, verdict_card
from ade_base.pictures.limits import ImageError
from ade_base.pictures.read import MAX_FILE_BYTES, header_pixels, is_image_name, read_image
from ade_base.tables import write_csv
from ade_client.client import SERVER_ERROR, AdeError, ScoreResult
from ade_client.contract import Choice
from serving.api.score_table import columns, failed_row, scored_row
from serving.ingest.requests import MAX_REQUEST_PIXELS, RESIZED
from serving.page import charts
from serving.page.files import write_file
from serving.page.served import (
    NOT_STARTED,
    Runs,
    Served,
    Shared,
    is_outdated,
    latest_only,
    live,
    page_error,
    read,
    resize_input,
    sentence,
    slider,
)
from serving.page.tab_score import WORDS, alpha_input, notes_of
from serving.page.uploads import MOST_IMAGES, TOO_MANY, is_accepted, own_name
from serving.verdict.conformal import benjamini_hochberg, simes
from serving.verdict.decision import TWO_CALIBRATIONS, fdr_note

AT_ONCE = 32  # files a request
BATCH_BYTES = 16 * 2**20
MOST_ENTRIES = 10_000  # in zips, including files that are not images
MOST_EXTRA = 2**20  # bytes of the extra fields of a zip's entries
ENTRY_MARK = b"PK\x01\x02"  # signature of an entry in a zip's directory
MOST_BYTES = 256 * 2**20  # unpacked
TABLE = Path(__file__).with_name("results.js").read_text()
EMPTY = (
    "Verdicts appear here: drop images or a zip of them, or choose a folder, and press Score all."
)
UNACCEPTED = AdeError(415, "not_an_image", "this type of file is not accepted")
NOT_TAKEN = (
    f"The page could not take these files. {TOO_MANY} If they are fewer, reload the page and "
    "choose them again."
)
CHANGED = "The model or the files were just changed: press Score all again."
REPLACED = (
    "two versions of the calibration judged these images, because it was replaced meanwhile or an "
    "upgrade is under way: score them again to get figures for the whole set"
)
THUMBNAIL = 48  # pixels of the longer side at most


def contents(paths: list[str]) -> Iterator[tuple[str, bytes]]:
    """Yield the name and bytes of each image file, also of those in ``.zip`` files.

    Only one file is in memory at a time.

    Raises:
        gr.Error: a file is too large, a zip is damaged, or all of them are too many.
    """
    count = size = packed = entries = 0

    def of_zip(path: str) -> Iterator[tuple[str, bytes]]:
        nonlocal packed, entries
        zipped = read(path)
        packed, entries = packed + len(zipped), entries + zipped.count(ENTRY_MARK)
        # Before the directory is parsed, which takes a hundred times its size in memory.
        if entries > MOST_ENTRIES or packed > MOST_BYTES:
            raise gr.Error(
                f"At most {MOST_ENTRIES} files in zips at once, and {MOST_BYTES >> 20} MiB of zips."
            )
        return _unzipped(zipped, own_name(path))

    for path in dict.fromkeys(paths):
        if is_outdated():
            return
        for name, data in (
            of_zip(path) if Path(path).suffix.lower() == ".zip" else [(own_name(path), read(path))]
        ):
            count += 1
            size += len(data)
            if count > MOST_IMAGES:
                raise gr.Error(TOO_MANY)
            if size > MOST_BYTES:
                raise gr.Error(
                    f"At most {MOST_BYTES >> 20} MiB at once: `ade score` takes folders of any "
                    "size."
                )
            yield name, data


def _unzipped(zipped: bytes, shown: str) -> Iterator[tuple[str, bytes]]:
    """Unpack the images of a zip file, each up to :data:`MAX_FILE_BYTES`.

    Other entries are skipped, including zip files and what macOS adds.

    Args:
        zipped: its content.
        shown: its name, for messages.
    """
    # Python copies the rest of an entry's extra fields for each of them.
    marks = (mark.start() for mark in re.finditer(ENTRY_MARK, zipped))
    if sum(int.from_bytes(zipped[at + 30 : at + 32], "little") for at in marks) > MOST_EXTRA:
        raise gr.Error(f"{shown} has too much metadata: create the zip again.")
    try:
        with zipfile.ZipFile(io.BytesIO(zipped)) as archive:
            for info in archive.infolist():
                if not is_image_name(info.filename):
                    continue
                name = info.filename[-200:]  # it may have 64 KiB
                entry = f"{name} in {shown}"
                if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    # Python unpacks other methods without a limit, whatever the declared size.
                    raise gr.Error(
                        f"{entry} is compressed by another method than deflate: create the zip "
                        "again."
                    )
                with archive.open(info) as file:
                    data = b"" if info.file_size > MAX_FILE_BYTES else file.read(MAX_FILE_BYTES + 1)
                # The declared size may be too small.
                if max(info.file_size, len(data)) > MAX_FILE_BYTES:
                    raise gr.Error(
                        f"{entry} is too large: an image file may have at most "
                        f"{MAX_FILE_BYTES >> 20} MiB unpacked."
                    )
                yield name, data
    except (gr.Error, MemoryError):
        raise
    except Exception:  # zipfile raises struct.error, zlib.error, RuntimeError, …
        raise gr.Error(
            f"{shown} cannot be unpacked: it is damaged, encrypted or not a zip file."
        ) from None


def batches(named: Iterable[tuple[str, bytes]]) -> Iterator[list[tuple[str, bytes]]]:
    """Group files into requests that the service takes, of at most :data:`AT_ONCE` files.

    A single file may be too large for one; the service says so.
    """
    batch: list[tuple[str, bytes]] = []
    size = pixels = 0
    for name, data in named:
        more = header_pixels(data)
        if batch and (
            len(batch) == AT_ONCE
            or size + len(data) > BATCH_BYTES
            or pixels + more > MAX_REQUEST_PIXELS
        ):
            yield batch
            batch, size, pixels = [], 0, 0
        batch.append((name, data))
        size, pixels = size + len(data), pixels + more
    if batch:
        yield batch


def add_tab(shared: Shared) -> None:
    """Lay the tab out."""
    served = shared.served

    def score_many(
        model: str,
        files: list[str] | None,
        folder: list[str] | None,
        fdr: float,
        resize: bool,
        alpha: float = 0.01,
        progress: gr.Progress = gr.Progress(),  # noqa: B008  (Gradio's way)
    ) -> tuple[Any, Any, Any]:
        """Summarise all files; a row for each, the most unusual first; and the rows as CSV."""
        if not files and not folder:
            raise gr.Error(
                "There are no files yet: drop some, or a zip of them, or choose a folder."
            )
        inside = [path for path in folder or [] if is_image_name(own_name(path))]
        given = files or []
        paths = [*(path for path in given if is_accepted(own_name(path))), *inside]
        others = [name for name in map(own_name, given) if not is_accepted(name)]
        others = [name for name in others if not name.startswith("._")]
        count = sum(1 for _ in contents(paths))  # refuse everything before the first file is scored
        if not count:
            raise gr.Error("There are no images among the files.")
        names: list[str] = []
        pictures: list[str] = []
        results: list[Any] = []
        for batch in batches(contents(paths)):
            if is_outdated():
                return gr.skip(), gr.skip(), gr.skip()  # nobody will see the rest
            progress((len(results), count), unit="images")
            scored = _scores(served, model, [data for _, data in batch], resize, alpha)
            names += [name for name, _ in batch]
            pictures += [
                "" if isinstance(result, AdeError) else _thumbnail(data)
                for (_, data), result in zip(batch, scored, strict=True)
            ]
            results += scored
        names = _numbered(names + others)
        pictures += [""] * len(others)
        results += [UNACCEPTED] * len(others)
        judged = [result for result in results if result.decision != "no_verdict"]
        p_values = [result.p_value for result in judged]
        discoveries = sum(benjamini_hochberg(p_values, fdr)) if judged else 0
        calibrations = served.calibrations_of(model)
        judges = [calibrations.of(_is_resized(result)) for result in judged]
        calibrated = {id(one): len(one.scores) for one in judges if one is not None}
        rejected = sum(result.decision == "reject" for result in judged)
        said = _said(
            len(results),
            p_values,
            rejected,
            discoveries,
            alpha,
            fdr,
            list(calibrated.values()),
            len({result.calibration for result in judged}) > 1,
        )
        order = sorted(range(len(results)), key=lambda i: _rank(results[i]))
        shown = [{"picture": pictures[i], **_shown(names[i], results[i])} for i in order]
        table = io.StringIO(newline="")
        write_csv(
            table,
            columns(served.bundles[model], samples=1),
            (_row(names[i], results[i]) for i in order),
        )
        download = write_file(table.getvalue().encode(), "scores.csv")
        return said, shown, gr.DownloadButton(value=download, interactive=True)

    def clear(*values: Any) -> tuple[str, list[Any], Any]:
        *chosen, runs = values
        runs.start()  # what still runs is of other files or of another model
        runs.chosen = tuple(chosen)
        return charts.empty(EMPTY), [], gr.DownloadButton(interactive=False)

    def forget(runs: Runs) -> tuple[str, list[Any], Any]:
        """Clear without the files, which the page has refused. Gradio shows no message for it."""
        runs.start()
        return charts.problem(NOT_TAKEN), [], gr.DownloadButton(interactive=False)

    def clear_if_failed(runs: Runs) -> Any:
        if runs.failed != runs.latest:
            return (gr.skip(),) * 3
        return charts.problem(runs.error or NOT_STARTED), [], gr.DownloadButton(interactive=False)

    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            files = gr.File(
                label="Images, or a zip of them",
                file_count="multiple",
                height=180,
                file_types=["image", ".zip"],
            )
            folder = gr.File(label="Or a folder", file_count="directory", height=130)
            for given in (files, folder):
                given.preprocess = _paths  # type: ignore[method-assign]
            alpha = alpha_input("Score all")
            resize = resize_input()
            with gr.Accordion("More settings", open=False):
                fdr = slider(
                    0.01,
                    0.5,
                    value=0.1,
                    step=0.01,
                    label="False discovery rate",
                    info="Expected share of false alarms among the reported images.",
                )
            go = gr.Button("Score all", variant="primary")
        with gr.Column(scale=5, min_width=280, elem_classes="ade-outcome"):
            said = live(charts.empty(EMPTY))
            table = gr.HTML(
                [],
                html_template='<div class="ade-results"></div>',
                js_on_load=TABLE,
                apply_default_css=False,
            )
            download = gr.DownloadButton("Download CSV", interactive=False)
    results = [said, table, download]
    runs = gr.State(Runs())
    scored = go.click(
        latest_only(score_many, len(results), of=range(3), changed=CHANGED),
        [shared.model, files, folder, fdr, resize, alpha, runs],
        results,
        api_name="score_many",
        show_progress_on=said,
        trigger_mode="multiple",
    )
    quiet: Any = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}
    chosen: list[Any] = [shared.model, files, folder]
    cleared = gr.on([one.change for one in chosen], clear, [*chosen, runs], results, **quiet)
    cleared.failure(forget, runs, results, **quiet)
    scored.failure(clear_if_failed, runs, results, **quiet)


def _paths(payload: Any) -> list[str] | None:
    """The paths of uploads.

    Gradio's own function refuses all of them for one of another type, and makes a file for each.
    """
    return None if payload is None else [file.path for file in payload]


def _numbered(names: list[str]) -> list[str]:
    """Tell files of one name apart: of a folder inside a folder, Gradio gives no more."""
    seen: Counter[str] = Counter()
    numbered = []
    for name in names:
        seen[name] += 1
        numbered.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return numbered


def _said(
    count: int,
    p_values: list[float],
    rejected: int,
    discoveries: int,
    alpha: float,
    fdr: float,
    calibrated: list[int],
    was_replaced: bool = False,
) -> str:
    """Summarise ``count`` files; HTML.

    Args:
        count: number of files.
        p_values: p-values of the files that got a verdict.
        rejected: number of files that are rejected individually.
        discoveries: number of files that are reported together.
        alpha: false-alarm rate.
        fdr: false discovery rate.
        calibrated: numbers of images of the calibrations that judged these files.
        was_replaced: whether two versions of a calibration judged them.
    """
    judged = len(p_values)
    if not judged:
        whole = f"No verdict on any of {count} files: their notes say why."
        if count == 1:
            whole = "No verdict on the file: its notes say why."
        return verdict_card("no_verdict", whole)
    sentence = (
        f"At a false-alarm rate of {percent(alpha)}, about {rounded(alpha * judged)} of {judged} "
        "images would be rejected by mistake if all were like the calibration images."
    )
    notes = [
        f"{discoveries or 'None'} of {judged} images {'are' if discoveries > 1 else 'is'} unusual "
        f"enough for a list with at most {percent(fdr)} false alarms on average (false discovery "
        "rate, by the method of Benjamini and Hochberg)."
    ]
    limits = [TWO_CALIBRATIONS] if len(calibrated) > 1 else []
    if was_replaced:
        limits.append(REPLACED)
    if not discoveries and (note := fdr_note(min(calibrated, default=0), judged, fdr)) is not None:
        limits.append(note)
    notes += [f"{note[:1].upper()}{note[1:]}." for note in limits]
    if judged < count:
        unjudged = f"{count - judged} of {count} files got no verdict: their notes say why."
        notes.insert(0, unjudged)
    facts = [f"is any of them unusual? p = {simes(p_values):.2g} (Simes)"] if judged > 1 else []
    heading = f"{rejected} of {judged} images rejected"
    choice: Choice = "reject" if rejected else "no_verdict" if judged < count else "accept"
    return verdict_card(choice, sentence, facts, notes, heading)


def _scores(
    served: Served, model: str, batch: list[bytes], resize: bool, alpha: float
) -> list[Any]:
    """The scores of one request; if no image could be used, the error of each."""
    client = served.clients[model]
    try:
        return client.score(batch, alpha=alpha, explain=False, resize=resize)
    except httpx.TransportError as error:
        raise page_error(error) from None
    except AdeError as error:
        if error.status >= 500 or error.code in (SERVER_ERROR, "other_model"):
            raise page_error(error) from None
        if len(batch) == 1:
            return [error]
    return [result for data in batch for result in _scores(served, model, [data], resize, alpha)]


def _is_resized(result: ScoreResult) -> bool:
    return any(note.startswith(RESIZED) for note in result.notes)


def _rank(result: Any) -> tuple[float, float]:
    """Sort key: the most unusual first, images without a verdict last."""
    if isinstance(result, AdeError) or result.p_value is None:
        return (2.0, 0.0)
    return (result.p_value, -(result.ood_score or 0.0))


def _row(name: str, result: Any) -> dict[str, Any]:
    """A row of the CSV file."""
    if isinstance(result, AdeError):
        return failed_row(name, result.code, sentence(result))
    return scored_row(name, dataclasses.replace(result, notes=notes_of(result)))


def _shown(name: str, result: Any) -> dict[str, Any]:
    """A row for ``results.js``."""
    if isinstance(result, AdeError):
        bpd = p_value = None
        choice, verdict, notes = "not_scored", "not scored", sentence(result)
    else:
        bpd, p_value = round(result.bpd, 4), result.p_value and round(result.p_value, 6)
        choice, verdict = result.decision, WORDS[result.decision]
        reason = (result.decision_reason or "").partition(": ")[2]
        notes = "; ".join([*([reason] if reason else []), *notes_of(result)])
    return {
        "file": name,
        "bpd": bpd,
        "p": p_value,
        "verdict": verdict,
        "notes": notes,
        "choice": choice,
    }


def _thumbnail(data: bytes) -> str:
    """A thumbnail for the table, as a data URL; empty if the file cannot be read."""
    try:
        picture = Image.fromarray(read_image(data).pixels)
    except (ImageError, MemoryError):
        return ""
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    out = io.BytesIO()
    picture.save(out, "WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(out.getvalue()).decode()}"
