"""The tab *Score many*: a table of files, judged together."""

from __future__ import annotations

import base64
import csv
import io
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
import numpy as np
from PIL import Image

from serving.client import AdeError
from serving.decision import fdr_note
from serving.images import IMAGE_SUFFIXES, ImageError, read_image, write_png
from serving.ood import benjamini_hochberg, simes
from serving.page.score import verdict_word
from serving.page.served import Served, Shared, ask, file, resize_input, sentence

AT_ONCE = 32  # files a request
MOST = 2000
MOST_BYTES = 256 * 2**20  # unpacked
ALPHA = 0.01  # of each image by itself
COLUMNS = ["file", "bpd", "p-value", "verdict", "notes"]
THUMBNAIL = 48  # pixels a side at most


def contents(paths: list[str]) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of each image file, those inside of ``.zip`` files too; at most :data:`MOST`."""
    count = size = 0
    for path in paths:
        found: Iterator[tuple[str, bytes]]
        if Path(path).suffix.lower() == ".zip":
            found = _unzipped(path)
        else:
            found = iter([(Path(path).name, Path(path).read_bytes())])
        for item in found:
            if count == MOST:
                raise gr.Error(f"At most {MOST} images at once: `ade score` takes folders of any size.")
            count += 1
            size += len(item[1])
            if size > MOST_BYTES:
                raise _too_much()
            yield item


def _too_much() -> gr.Error:
    return gr.Error(f"At most {MOST_BYTES >> 20} MiB at once: `ade score` takes folders of any size.")


def _unzipped(path: str) -> Iterator[tuple[str, bytes]]:
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if Path(info.filename).suffix.lower() not in IMAGE_SUFFIXES:
                    continue
                if info.file_size > MOST_BYTES:  # before it is unpacked
                    raise _too_much()
                yield info.filename, archive.read(info)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError) as error:
        raise gr.Error(f"{Path(path).name} cannot be unpacked: {error}.") from None


def add_tab(shared: Shared) -> None:
    """Lay the tab out."""
    served = shared.served

    def score_many(model: str, files: list[str] | None, folder: list[str] | None, fdr: float,
                   resize: bool, progress: gr.Progress = gr.Progress()) -> tuple[str, list[list[Any]], Any]:  # noqa: B008  # Gradio's way
        """What is to be reported of the files together, a row each, and the rows as a CSV file."""
        if not files and not folder:
            raise gr.Error("There are no files yet: drop some, or a zip of them, or choose a folder.")
        inside = [path for path in folder or [] if Path(path).suffix.lower() in IMAGE_SUFFIXES]
        named = list(contents([*(files or []), *inside]))
        if not named:
            raise gr.Error("There are no images among the files.")
        results: list[Any] = []
        for first in range(0, len(named), AT_ONCE):
            progress((first, len(named)), unit="images")
            batch = [data for _, data in named[first:first + AT_ONCE]]
            results += _scores(served, model, batch, resize)
        judged = [i for i, r in enumerate(results) if not isinstance(r, AdeError) and r.p_value is not None]
        p_values = [results[i].p_value for i in judged]
        found = dict(zip(judged, benjamini_hochberg(p_values, fdr), strict=True)) if judged else {}
        rows = [_row(name, result, found.get(i)) for i, ((name, _), result) in enumerate(zip(named, results, strict=True))]
        calibrations = served.calibrations[model]
        calibrated = [len(judge.scores) for judge in (calibrations.exact, calibrations.resized) if judge is not None]
        alone = sum(results[i].decision == "reject" and not is_found for i, is_found in found.items())
        said = _said(len(rows), p_values, sum(found.values()), alone, fdr, min(calibrated, default=0))
        shown = [["" if isinstance(result, AdeError) else _thumbnail(data), *row]
                 for (_, data), result, row in zip(named, results, rows, strict=True)]
        return said, shown, gr.DownloadButton(value=file(_csv(rows), "scores.csv"), interactive=True)

    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            files = gr.File(label="Images, or a zip of them", file_count="multiple", height=200,
                            file_types=["image", ".zip"])
            folder = gr.File(label="Or a folder", file_count="directory", height=140)
            fdr = gr.Slider(0.01, 0.5, value=0.1, step=0.01, label="False discovery rate",
                            info="expected share of false ones among those that are reported")
            resize = resize_input(served)
            go = gr.Button("Score all", variant="primary")
        with gr.Column(scale=2, min_width=300):
            said = gr.Markdown()
            table = gr.Dataframe(headers=["image", *COLUMNS], datatype=["html", "str", "number", "number", "str", "str"],
                                 interactive=False, label="Scores; a click on a head sorts", wrap=True,
                                 column_widths=[72, 160, 80, 100, 150, 300])
            download = gr.DownloadButton("Download CSV", interactive=False)
    go.click(score_many, [shared.model, files, folder, fdr, resize], [said, table, download], api_name="score_many")


def _said(count: int, p_values: list[float], found: int, alone: int, fdr: float, calibrated: int) -> str:
    """What is to be reported of ``count`` files, in words.

    Args:
        count: of files.
        p_values: of those that got a verdict.
        found: discoveries at ``fdr``.
        alone: further images that are rejected each by itself.
        fdr: false discovery rate.
        calibrated: calibration images.
    """
    rest = f"{count - len(p_values)} of {count} got no verdict: their notes say why." if len(p_values) < count else ""
    if not p_values:
        return f"**No verdict on any of {count} images.** The notes say why."
    said = f"**{found + alone} of {len(p_values)} images are unlike the training images**"
    if alone:
        said += (f": {found} at a false discovery rate of {fdr:g} (Benjamini and Hochberg), and {alone} more each at a "
                 f"false-alarm rate of {ALPHA:g}, where about {ALPHA * len(p_values):.1f} of {len(p_values)} usual images "
                 "are rejected.")
    else:
        said += f"; of those, a share of at most {fdr:g} is expected to be false (Benjamini and Hochberg)."
    note = fdr_note(calibrated, len(p_values), fdr)
    if note is not None and not found:
        said += f" {note[:1].upper()}{note[1:]}."
    if len(p_values) > 1:
        said += f" All together: p = {simes(p_values):.3g} (Simes)."
    return f"{said} {rest}"


def _scores(served: Served, model: str, batch: list[bytes], resize: bool) -> list[Any]:
    """Of one request; where no image of it could be used, each one's own error."""
    client = served.clients[model]
    try:
        return client.score(batch, alpha=ALPHA, explain=False, resize=resize)
    except httpx.TransportError as error:
        ask(_raise, error)
    except AdeError as error:
        if len(batch) == 1:
            return [error]
        if error.status >= 500:
            ask(_raise, error)
    return [result for data in batch for result in _scores(served, model, [data], resize)]


def _raise(error: Exception) -> None:
    raise error


def _row(name: str, result: Any, is_found: bool | None) -> list[Any]:
    if isinstance(result, AdeError):
        return [name, None, None, "could not be scored", sentence(result)]
    verdict = "unlike the training images" if is_found else verdict_word(result)
    return [name, round(result.bpd, 4), result.p_value and round(result.p_value, 6), verdict, "; ".join(result.notes)]


def _thumbnail(data: bytes) -> str:
    """A small picture for the table."""
    try:
        picture = Image.fromarray(read_image(data).pixels)
    except (ImageError, MemoryError):
        return ""
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    source = base64.b64encode(write_png(np.asarray(picture))).decode()
    style = f"width:{THUMBNAIL}px;height:{THUMBNAIL}px;object-fit:contain;image-rendering:pixelated"
    return f'<img src="data:image/png;base64,{source}" alt="" style="{style}">'


def _csv(rows: list[list[Any]]) -> bytes:
    out = io.StringIO(newline="")
    writer = csv.writer(out)
    writer.writerow(COLUMNS)
    writer.writerows(rows)
    return out.getvalue().encode()
