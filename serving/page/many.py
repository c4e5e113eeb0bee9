"""The tab *Score many*: a table of files, judged together."""

from __future__ import annotations

import base64
import csv
import io
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
import numpy as np
from PIL import Image

from serving.client import AdeError
from serving.images import IMAGE_SUFFIXES, MAX_FILE_BYTES, ImageError, read_image, write_png
from serving.page.files import write_file
from serving.page.score import verdict_word
from serving.page.served import Served, Shared, ask, read, resize_input, sentence
from serving.tables import safe_cell
from serving.verdict.calibration import benjamini_hochberg, simes
from serving.verdict.decision import fdr_note

AT_ONCE = 32  # files a request
BATCH_BYTES = 16 * 2**20
MOST = 2000
MOST_ENTRIES = 10_000  # of a zip, other files than images too
ENTRY_MARK = b"PK\x01\x02"  # each entry of a zip's directory begins with it
MOST_BYTES = 256 * 2**20  # unpacked
ALPHA = 0.01  # of each image by itself
COLUMNS = ["file", "bpd", "p-value", "verdict", "notes"]
THUMBNAIL = 48  # pixels a side at most


def contents(paths: list[str]) -> Iterator[tuple[str, bytes]]:
    """Yield name and bytes of each image file, those inside of ``.zip`` files too; one file is in
    memory at a time.

    Raises:
        gr.Error: a file is too large, a zip is damaged, or all of them are too many.
    """
    count = size = 0
    for path in paths:
        for name, data in (
            _unzipped(path)
            if Path(path).suffix.lower() == ".zip"
            else [(Path(path).name, read(path))]
        ):
            count += 1
            size += len(data)
            if count > MOST:
                raise gr.Error(
                    f"At most {MOST} images at once: `ade score` takes folders of any size."
                )
            if size > MOST_BYTES:
                raise gr.Error(
                    f"At most {MOST_BYTES >> 20} MiB at once: `ade score` takes folders of any size."
                )
            yield name, data


def _unzipped(path: str) -> Iterator[tuple[str, bytes]]:
    """Unpack the images of a zip file, each up to :data:`MAX_FILE_BYTES`; other entries, zips
    included, are skipped.
    """
    zipped, shown = read(path), Path(path).name
    # Before the directory of entries is read, which takes a hundred times the memory.
    if zipped.count(ENTRY_MARK) > MOST_ENTRIES:
        raise gr.Error(f"{shown} holds more than {MOST_ENTRIES} files.")
    try:
        with zipfile.ZipFile(io.BytesIO(zipped)) as archive:
            for info in archive.infolist():
                if Path(info.filename).suffix.lower() not in IMAGE_SUFFIXES:
                    continue
                entry = f"{info.filename[:200]} in {shown}"
                if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    # Python unpacks these without a bound, whatever size is declared.
                    raise gr.Error(
                        f"{entry} is packed by another method than deflate: pack it anew."
                    )
                with archive.open(info) as file:
                    data = b"" if info.file_size > MAX_FILE_BYTES else file.read(MAX_FILE_BYTES + 1)
                if (
                    max(info.file_size, len(data)) > MAX_FILE_BYTES
                ):  # what is declared may be less than what is there
                    raise gr.Error(
                        f"{entry} is too large: an image file may have {MAX_FILE_BYTES >> 20} MiB unpacked."
                    )
                yield info.filename, data
    except (gr.Error, MemoryError):
        raise
    except Exception:  # whatever zipfile stumbles over: struct.error, zlib.error, UnicodeDecodeError, RuntimeError, …
        raise gr.Error(
            f"{shown} cannot be unpacked: it is damaged, encrypted or not a zip file."
        ) from None


def batches(named: Iterable[tuple[str, bytes]]) -> Iterator[list[tuple[str, bytes]]]:
    """Group files into requests of at most :data:`AT_ONCE` files and about :data:`BATCH_BYTES`."""
    batch: list[tuple[str, bytes]] = []
    for item in named:
        batch.append(item)
        if len(batch) == AT_ONCE or sum(len(data) for _, data in batch) >= BATCH_BYTES:
            yield batch
            batch = []
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
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> tuple[str, list[list[Any]], Any]:  # Gradio's way
        """What is to be reported of the files together, a row each, and the rows as a CSV file."""
        if not files and not folder:
            raise gr.Error(
                "There are no files yet: drop some, or a zip of them, or choose a folder."
            )
        inside = [path for path in folder or [] if Path(path).suffix.lower() in IMAGE_SUFFIXES]
        paths = [*(files or []), *inside]
        count = sum(
            1 for _ in contents(paths)
        )  # what is refused is refused before anything is scored
        if not count:
            raise gr.Error("There are no images among the files.")
        names: list[str] = []
        pictures: list[str] = []
        results: list[Any] = []
        for batch in batches(contents(paths)):
            progress((len(results), count), unit="images")
            scored = _scores(served, model, [data for _, data in batch], resize)
            names += [name for name, _ in batch]
            pictures += [
                "" if isinstance(result, AdeError) else _thumbnail(data)
                for (_, data), result in zip(batch, scored, strict=True)
            ]
            results += scored
        judged = [
            i
            for i, r in enumerate(results)
            if not isinstance(r, AdeError) and r.p_value is not None
        ]
        p_values = [results[i].p_value for i in judged]
        found = dict(zip(judged, benjamini_hochberg(p_values, fdr), strict=True)) if judged else {}
        rows = [
            _row(name, result, found.get(i))
            for i, (name, result) in enumerate(zip(names, results, strict=True))
        ]
        calibrations = served.calibrations[model]
        calibrated = [
            len(judge.scores)
            for judge in (calibrations.exact, calibrations.resized)
            if judge is not None
        ]
        alone = sum(
            results[i].decision == "reject" and not is_found for i, is_found in found.items()
        )
        said = _said(
            len(rows), p_values, sum(found.values()), alone, fdr, min(calibrated, default=0)
        )
        shown = [[picture, *row] for picture, row in zip(pictures, rows, strict=True)]
        return (
            said,
            shown,
            gr.DownloadButton(value=write_file(_csv(rows), "scores.csv"), interactive=True),
        )

    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            files = gr.File(
                label="Images, or a zip of them",
                file_count="multiple",
                height=200,
                file_types=["image", ".zip"],
            )
            folder = gr.File(label="Or a folder", file_count="directory", height=140)
            fdr = gr.Slider(
                0.01,
                0.5,
                value=0.1,
                step=0.01,
                label="False discovery rate",
                info="expected share of false ones among those that are reported",
            )
            resize = resize_input(served)
            go = gr.Button("Score all", variant="primary")
        with gr.Column(scale=2, min_width=300):
            said = gr.Markdown()
            table = gr.Dataframe(
                headers=["image", *COLUMNS],
                datatype=["html", "str", "number", "number", "str", "str"],
                interactive=False,
                label="Scores; a click on a head sorts",
                wrap=True,
                column_widths=[72, 160, 80, 100, 150, 300],
            )
            download = gr.DownloadButton("Download CSV", interactive=False)
    go.click(
        score_many,
        [shared.model, files, folder, fdr, resize],
        [said, table, download],
        api_name="score_many",
    )


def _said(
    count: int, p_values: list[float], found: int, alone: int, fdr: float, calibrated: int
) -> str:
    """What is to be reported of ``count`` files, in words.

    Args:
        count: of files.
        p_values: of those that got a verdict.
        found: discoveries at ``fdr``.
        alone: further images that are rejected each by itself.
        fdr: false discovery rate.
        calibrated: calibration images.
    """
    rest = (
        f"{count - len(p_values)} of {count} got no verdict: their notes say why."
        if len(p_values) < count
        else ""
    )
    if not p_values:
        return f"**No verdict on any of {count} images.** The notes say why."
    said = f"**{found + alone} of {len(p_values)} images are unlike the training images**"
    if alone:
        said += (
            f": {found} at a false discovery rate of {fdr:g} (Benjamini and Hochberg), and {alone} more each at a "
            f"false-alarm rate of {ALPHA:g}, where about {ALPHA * len(p_values):.1f} of {len(p_values)} usual images "
            "are rejected."
        )
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
    return [
        name,
        round(result.bpd, 4),
        result.p_value and round(result.p_value, 6),
        verdict,
        "; ".join(result.notes),
    ]


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
    writer.writerows(
        [safe_cell(cell) if isinstance(cell, str) else cell for cell in row] for row in rows
    )
    return out.getvalue().encode()
