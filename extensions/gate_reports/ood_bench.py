"""Measures how well a bundle's verdict detects OOD images, corrupted ID images among them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path

from ade_base.pictures.view import Look
from export.gate.corruptions import CORRUPTIONS
from export.gate.images import Images, Prepared, counting, digests_of, others, prepared
from export.gate.measuring import Measured, measured
from export.gate.rejection import corruptions_of
from extensions.gate_reports.ood_bench_report import write_report
from serving.engine.engine import InferenceEngine
from serving.engine.noise import short_digest
from serving.ingest.picture import Picture
from serving.verdict.calibration import CalibrationError
from training.data import Report


def bench(
    engine: InferenceEngine,
    id_name: str,
    id_images: Images,
    ood_sets: Mapping[str, Images],
    corrupt: int,
    out: Path,
    report: Report,
    trained: Images = (),
) -> Path:
    """Measure how well the default calibration detects OOD images, and write the report.

    Corrupted ID images are added to the sets; a kind of them without any finite likelihood is left
    out. Images of another size are resized as a request with ``resize`` does it.

    Args:
        engine: with ``score``.
        id_name: describes the ID images.
        id_images: those that made the calibration, and their copies, are left out.
        ood_sets: sets of OOD images by name.
        corrupt: number of ID images that are corrupted in each way.
        out: a folder.
        report: called with each line of progress.
        trained: images that a network of the bundle was trained on; their copies among the ID
            images are left out, too.

    Returns:
        The report's path.

    Raises:
        CalibrationError: no image of a set can be used.
    """
    calibrations, shape = engine.calibrations, engine.image_shape
    ignored = calibrations.look_of(False).ignored
    copies = prepared(trained, shape, True, lambda resized: Look(0, ignored))
    known = digests_of(calibrations) | {
        short_digest(image.pixels)
        for _, image in counting("training", copies)
        if isinstance(image, Picture)
    }

    def unused(report: Report) -> Iterator[Prepared]:
        return others(id_name, ready(id_images), known, report)

    def ready(images: Images) -> Iterator[Prepared]:
        return prepared(images, shape, True, calibrations.look_of)

    def measure(images: Iterable[Prepared], name: str) -> Measured:
        return measured(engine, images, name, report, calibrations.encoders)

    id_set = measure(unused(report), id_name)
    sets = {name: measure(ready(images), name) for name, images in ood_sets.items()}
    found = (image for _, image in unused(lambda line: None) if isinstance(image, Picture))
    few = list(islice(found, corrupt))
    for name, changed in corruptions_of(few, ignored):
        if name not in CORRUPTIONS:
            continue
        try:
            sets[name] = measure([("", image) for image in changed], name)
        except CalibrationError as error:
            report(f"left out {error}")
    return write_report(calibrations, engine.bundle.model_id, id_name, id_set, sets, out)
