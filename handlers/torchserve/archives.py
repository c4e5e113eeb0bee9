"""Writes the model archives that TorchServe loads from a bundle, one per operation."""

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
from handlers.service.options import ServingOptions, served_name
from serving.engine.bundle import (
    ENCODER_NAME,
    FEATURES_NAME,
    MANIFEST_NAME,
    TORCHSCRIPT_NAME,
    WEIGHTS_NAME,
    Bundle,
    calibration_file,
)
from serving.engine.signatures import OPERATIONS

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


def write_archives(
    bundle: Bundle,
    store: Path,
    options: ServingOptions,
    workers: dict[str, int],
    prefix: str | None = None,
) -> dict[str, int]:
    """Write the four ``.mar`` files of a bundle.

    Operations that the model lacks are served too: their handler answers with an error.

    Args:
        bundle: its files are verified first.
        store: TorchServe's model store.
        options: backend and device.
        workers: number of processes, by operation.
        prefix: prefix of the served names, for all bundles but the first.

    Returns:
        The names under which TorchServe serves the operations, and the workers of each.
    """
    served = {}
    for operation in OPERATIONS:
        graphs = bundle.graphs([operation])
        if options.backend == "torchscript":
            files = [TORCHSCRIPT_NAME, WEIGHTS_NAME]
        else:
            files = [*(f"{graph}.onnx" for graph in graphs), WEIGHTS_NAME]
        if operation == "score":
            files += [name for name in (FEATURES_NAME, ENCODER_NAME) if bundle.has(name)]
            files += map(calibration_file, bundle.calibrations)
        name = served_name(operation, prefix)
        config = {
            "minWorkers": workers[operation],
            "maxWorkers": workers[operation],
            "batchSize": MAX_BATCH,
            # 0 would mean TorchServe's default of 100.
            "maxBatchDelay": round(1000 * MAX_BATCH_DELAY_S),
            "responseTimeout": RESPONSE_TIMEOUT_S,
            "startupTimeout": STARTUP_TIMEOUT_S,
            "maxRetryTimeoutInSec": RETRY_S,
            "ade": {**dataclasses.asdict(options), "operation": operation},
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
        served[name] = workers[operation]
    return served
