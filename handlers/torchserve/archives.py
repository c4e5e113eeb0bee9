"""Writes the model archives that TorchServe loads from a bundle, one for each operation."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from model_archiver.model_archiver_config import ModelArchiverConfig
from model_archiver.model_packaging import generate_model_archive

from handlers.limits import MAX_BATCH, MAX_BATCH_DELAY_S, RESPONSE_TIMEOUT_S, STARTUP_TIMEOUT_S
from handlers.service.worker import WorkerSettings
from serving.engine.bundle import (
    ENCODER_NAME,
    FEATURES_NAME,
    MANIFEST_NAME,
    TORCHSCRIPT_NAME,
    WEIGHTS_NAME,
    calibration_file,
    open_bundle,
)

# TorchServe starts a worker again for this long, ever more rarely; after its own default of 300 s
# an operation would have no worker for good. It computes the milliseconds in 32 bits.
RETRY_S = 20 * 24 * 3600
OLDEST_TIME = (
    315_619_200  # 2 January 1980: zip files, such as model archives, know no earlier times
)


@contextmanager
def _temporary_files_in(folder: Path) -> Iterator[Path]:
    """Let the archiver use a temporary folder of its own.

    It empties ``TEMP/MODEL_NAME``, which could belong to another program.
    """
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        tempfile.tempdir = temporary
        try:
            yield Path(temporary)
        finally:
            tempfile.tempdir = before


def write_archive(
    settings: WorkerSettings, store: Path, num_workers: int, max_batch: int = MAX_BATCH
) -> None:
    """Write the ``.mar`` file of an operation of a bundle, whose files are verified first.

    TorchServe serves it under the name of the model. An operation that the model lacks is served
    too: its handler answers with an error.

    Args:
        settings: of the workers, except for what each one finds out itself: its name and logs, and
            the folder of the unpacked bundle.
        store: TorchServe's model store.
        num_workers: number of processes.
        max_batch: requests that TorchServe gives a worker at a time.
    """
    bundle, name, operation = open_bundle(Path(settings.bundle)), settings.model, settings.operation
    graphs = bundle.graphs([operation])
    if settings.options.backend == "torchscript":
        files = [TORCHSCRIPT_NAME, WEIGHTS_NAME]
    else:
        files = [*(f"{graph}.onnx" for graph in graphs), WEIGHTS_NAME]
    if operation == "score":
        files += [name for name in (FEATURES_NAME, ENCODER_NAME) if bundle.has(name)]
        files += map(calibration_file, bundle.calibrations)
    config = {
        "minWorkers": num_workers,
        "maxWorkers": num_workers,
        "batchSize": max_batch,
        # 0 would mean TorchServe's default of 100.
        "maxBatchDelay": round(1000 * MAX_BATCH_DELAY_S),
        "responseTimeout": RESPONSE_TIMEOUT_S,
        "startupTimeout": STARTUP_TIMEOUT_S,
        "maxRetryTimeoutInSec": RETRY_S,
        "ade": dataclasses.asdict(settings),
    }
    with _temporary_files_in(store) as temporary:
        config_file = temporary / f"{name}.yaml"
        config_file.write_text(yaml.safe_dump(config))
        # Linked, because the archiver splits paths at commas and expands wildcards in them.
        links = temporary / "files"
        links.mkdir()
        for file in (bundle.folder / MANIFEST_NAME, *map(bundle.file, files)):
            source = file.resolve()
            if source.stat().st_mtime < OLDEST_TIME:
                shutil.copyfile(source, links / file.name)  # with the time of now
            else:
                (links / file.name).symlink_to(source)
        generate_model_archive(
            ModelArchiverConfig(
                model_name=name,
                handler=str(Path(__file__).with_name("entry.py")),
                version="1.0",
                extra_files=str(links),
                export_path=str(store),
                force=True,
                runtime="python",
                archive_format="default",
                config_file=str(config_file),
            )
        )
