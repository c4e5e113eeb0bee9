"""The tab *Score many*: a table of files, judged together."""

from __future__ import annotations

import base64
import dataclasses
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
from PIL import Image

from ade_base.brand import percent, rounded, verdict_card
from ade_base.pictures.limits import ImageError
from ade_base.pictures.read import is_image_name, read_image
from ade_base.tables import write_csv
from ade_client.client import SERVER_ERROR, AdeError, ScoreResult
from ade_client.contract import Choice
from serving.api.score_table import columns, failed_row, scored_row
from serving.ingest.picture import RESIZED
from serving.page import charts
from serving.page.contents import batches, contents
from serving.page.files import write_file
from serving.page.inputs import TabContext, live, resize_input, slider
from serving.page.models import Models, page_error, sentence
from serving.page.runs import QUIET, Runs, error_of, is_outdated, latest_only, skipped
from serving.page.uploads import TOO_MANY, is_accepted, own_name
from serving.page.verdict import WORDS, alpha_input, notes_of
from serving.verdict.conformal import benjamini_hochberg, simes
from serving.verdict.decision import TWO_CALIBRATIONS, fdr_note

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
    "two versions of the calibration judged these images, because a release was "
    "published meanwhile: score them again to get figures for the whole set"
)
THUMBNAIL = 48  # pixels of the longer side at most


@dataclass(frozen=True)
class Row:
    """A file, and its score or the error in its place."""

    name: str
    result: Any
    picture: str = ""  # a thumbnail as a data URL

    @property
    def rank(self) -> tuple[float, float]:
        """Sort key: the most unusual first, images without a verdict last."""
        if isinstance(self.result, AdeError) or self.result.p_value is None:
            return (2.0, 0.0)
        return (self.result.p_value, -(self.result.ood_score or 0.0))

    def for_csv(self) -> dict[str, Any]:
        if isinstance(self.result, AdeError):
            return failed_row(self.name, self.result.code, sentence(self.result))
        return scored_row(self.name, dataclasses.replace(self.result, notes=notes_of(self.result)))

    def for_page(self) -> dict[str, Any]:
        """A row for ``results.js``."""
        result, shown = self.result, {"picture": self.picture, "file": self.name}
        if isinstance(result, AdeError):
            none = {"bpd": None, "p": None, "verdict": "not scored", "choice": "not_scored"}
            return {**shown, **none, "notes": sentence(result)}
        reason = (result.decision_reason or "").partition(": ")[2]
        return {
            **shown,
            "bpd": round(result.bpd, 4),
            "p": result.p_value and round(result.p_value, 6),
            "verdict": WORDS[result.decision],
            "choice": result.decision,
            "notes": "; ".join([*([reason] if reason else []), *notes_of(result)]),
        }


def summary(results: Sequence[Any], alpha: float, fdr: float, calibrated: Sequence[int]) -> str:
    """Summarise files; HTML.

    Args:
        results: score or error of each file.
        alpha: false-alarm rate.
        fdr: false discovery rate.
        calibrated: numbers of images of the calibrations that judged these files.
    """
    count = len(results)
    scores = [one for one in results if not isinstance(one, AdeError)]
    decided = [one for one in scores if one.decision != "no_verdict"]
    if not decided:
        those = "the file" if count == 1 else f"any of {count} files"
        return verdict_card("no_verdict", f"No verdict on {those}: {_NOTES_SAY[count == 1]}")
    judged, p_values = len(decided), [one.p_value for one in decided]
    rejected = sum(one.decision == "reject" for one in decided)
    said = (
        f"At a false-alarm rate of {percent(alpha)}, about {rounded(alpha * judged)} of {judged} "
        "images would be rejected by mistake if all were like the calibration images."
    )
    unjudged = [f"{count - judged} of {count} files got no verdict: {_NOTES_SAY[False]}"]
    notes = [*(unjudged if judged < count else []), *_as_a_list(p_values, fdr, calibrated)]
    if len({one.calibration for one in decided}) > 1:
        notes.append(f"{REPLACED[:1].upper()}{REPLACED[1:]}.")
    facts = [f"is any of them unusual? p = {simes(p_values):.2g} (Simes)"] if judged > 1 else []
    choice: Choice = "reject" if rejected else "no_verdict" if judged < count else "accept"
    return verdict_card(choice, said, facts, notes, f"{rejected} of {judged} images rejected")


_NOTES_SAY = {True: "its notes say why.", False: "their notes say why."}


def _as_a_list(p_values: Sequence[float], fdr: float, calibrated: Sequence[int]) -> list[str]:
    """What can be said of all images together, and what limits it."""
    judged, discoveries = len(p_values), sum(benjamini_hochberg(p_values, fdr))
    limits = [TWO_CALIBRATIONS] if len(calibrated) > 1 else []
    if not discoveries and (note := fdr_note(min(calibrated, default=0), judged, fdr)) is not None:
        limits.append(note)
    return [
        f"{discoveries or 'None'} of {judged} images {'are' if discoveries > 1 else 'is'} unusual "
        f"enough for a list with at most {percent(fdr)} false alarms on average (false discovery "
        "rate, by the method of Benjamini and Hochberg).",
        *(f"{note[:1].upper()}{note[1:]}." for note in limits),
    ]


class ManyTab:
    """The tab."""

    def __init__(self, context: TabContext) -> None:
        self.models = context.models
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                types = ["image", ".zip"]
                label = "Images, or a zip of them"
                files = gr.File(label=label, file_count="multiple", height=180, file_types=types)
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
        results: list[Any] = [said, table, download]
        chosen: list[Any] = [context.model, files, folder]
        runs = gr.State(Runs())
        scored = go.click(
            latest_only(self.score_many, len(results), of=range(3), changed=CHANGED),
            [*chosen, fdr, resize, alpha, runs],
            results,
            api_name="score_many",
            show_progress_on=said,
            trigger_mode="multiple",
        )
        quiet: Any = {"queue": False, **QUIET}
        cleared = gr.on([one.change for one in chosen], clear, [*chosen, runs], results, **quiet)
        cleared.failure(forget, runs, results, **quiet)
        scored.failure(clear_if_failed, runs, results, **quiet)

    def score_many(
        self,
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
        count = sum(1 for _ in contents(paths))  # refuse everything before the first file is scored
        if not count:
            raise gr.Error("There are no images among the files.")
        rows: list[Row] = []
        for batch in batches(contents(paths)):
            if is_outdated():
                return gr.skip(), gr.skip(), gr.skip()  # nobody will see the rest
            progress((len(rows), count), unit="images")
            results = scores(self.models, model, [data for _, data in batch], resize, alpha)
            rows += [
                Row(name, result, "" if isinstance(result, AdeError) else _thumbnail(data))
                for (name, data), result in zip(batch, results, strict=True)
            ]
        rows += [Row(name, UNACCEPTED) for name in others if not name.startswith("._")]
        said = summary([one.result for one in rows], alpha, fdr, self._calibrated(model, rows))
        rows = sorted(_numbered(rows), key=lambda row: row.rank)
        table = io.StringIO(newline="")
        header = columns(self.models.bundles[model], samples=1)
        write_csv(table, header, (row.for_csv() for row in rows))
        download = write_file(table.getvalue().encode(), "scores.csv")
        shown = [row.for_page() for row in rows]
        return said, shown, gr.DownloadButton(value=download, interactive=True)

    def _calibrated(self, model: str, rows: Sequence[Row]) -> list[int]:
        """The numbers of images of the calibrations that judged files."""
        calibrations = self.models.calibrations_of(model)
        judged = [
            row.result
            for row in rows
            if not isinstance(row.result, AdeError) and row.result.decision != "no_verdict"
        ]
        judges = [calibrations.of(_is_resized(result)) for result in judged]
        return list({id(one): len(one.scores) for one in judges if one is not None}.values())


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
        return skipped(3)
    return charts.problem(error_of(runs)), [], gr.DownloadButton(interactive=False)


def scores(models: Models, model: str, batch: list[bytes], resize: bool, alpha: float) -> list[Any]:
    """The scores of one request; if no image could be used, the error of each."""
    client = models.clients[model]
    try:
        return client.score(batch, alpha=alpha, explain=False, resize=resize)
    except httpx.TransportError as error:
        raise page_error(error) from None
    except AdeError as error:
        if error.status >= 500 or error.code in (SERVER_ERROR, "other_model"):
            raise page_error(error) from None
        if len(batch) == 1:
            return [error]
    return [result for data in batch for result in scores(models, model, [data], resize, alpha)]


def _paths(payload: Any) -> list[str] | None:
    """The paths of uploads.

    Gradio's own function refuses all of them for one of another type, and makes a file for each.
    """
    return None if payload is None else [file.path for file in payload]


def _numbered(rows: Sequence[Row]) -> list[Row]:
    """Tell files of one name apart: of a folder inside a folder, Gradio gives no more."""
    seen: Counter[str] = Counter()
    numbered = []
    for row in rows:
        seen[row.name] += 1
        number = seen[row.name]
        name = row.name if number == 1 else f"{row.name} ({number})"
        numbered.append(dataclasses.replace(row, name=name))
    return numbered


def _is_resized(result: ScoreResult) -> bool:
    return any(note.startswith(RESIZED) for note in result.notes)


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
