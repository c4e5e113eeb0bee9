"""A bundle to the model archives that TorchServe loads: one an operation."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml
from model_archiver.model_archiver_config import ModelArchiverConfig
from model_archiver.model_packaging import generate_model_archive

from serving.engine.bundle import (
    CALIBRATION_NAME,
    FEATURES_NAME,
    MANIFEST_NAME,
    TORCHSCRIPT_NAME,
    WEIGHTS_NAME,
    Bundle,
)
from serving.engine.signatures import OPERATIONS

MAX_BATCH = 32
RESPONSE_TIMEOUT_S = 120
STARTUP_TIMEOUT_S = 180


@dataclass(frozen=True)
class ServingOptions:
    """How the workers of a bundle compute."""

    backend: str = "onnxruntime"
    device: str = "auto"
    threads: int = 1  # of a worker, to decode pictures with; it computes with one
    cuda_graphs: bool = False


def archive_name(operation: str, prefix: str | None) -> str:
    """The name under which an operation is served: the first bundle's plain, a further one's
    ``NAME-{op}``.
    """
    return operation if prefix is None else f"{prefix}-{operation}"


@contextmanager
def _temporary_files_in(folder: Path) -> Iterator[None]:
    """The archiver empties a folder of the model's name among the temporary ones, which may be
    another program's.
    """
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        tempfile.tempdir = temporary
        try:
            yield
        finally:
            tempfile.tempdir = before


def write_archives(
    bundle: Bundle,
    store: Path,
    options: ServingOptions,
    workers: dict[str, int],
    prefix: str | None = None,
) -> list[str]:
    """Write the four ``.mar`` files of a bundle; of an operation that the model does not have, one
    that says so.

    Args:
        bundle: its files are verified on the way.
        store: TorchServe's model store.
        options: backend and device.
        workers: processes, by operation.
        prefix: of the served names, for a further bundle.

    Returns:
        The names under which TorchServe serves them.
    """
    names = []
    for operation in OPERATIONS:
        graphs = bundle.graphs([operation])
        if options.backend == "torchscript":
            files = [TORCHSCRIPT_NAME, WEIGHTS_NAME]
        else:
            files = [*(f"{graph}.onnx" for graph in graphs), WEIGHTS_NAME]
        verdict = (CALIBRATION_NAME, *((FEATURES_NAME,) if operation == "score" else ()))
        files += [name for name in verdict if bundle.has(name)]
        name = archive_name(operation, prefix)
        config = {
            "minWorkers": workers[operation],
            "maxWorkers": workers[operation],
            "batchSize": MAX_BATCH,
            "maxBatchDelay": 1,  # milliseconds; 0 would mean TorchServe's default of 100
            "responseTimeout": RESPONSE_TIMEOUT_S,
            "startupTimeout": STARTUP_TIMEOUT_S,
            "ade": dataclasses.asdict(options),
        }
        config_file = store / f"{name}.yaml"
        config_file.write_text(yaml.safe_dump(config))
        with _temporary_files_in(store):
            generate_model_archive(
                ModelArchiverConfig(
                    model_name=name,
                    handler=str(Path(__file__).with_name(f"{operation}.py")),
                    version="1.0",
                    extra_files=",".join(
                        str(p) for p in [bundle.folder / MANIFEST_NAME, *map(bundle.file, files)]
                    ),
                    export_path=str(store),
                    force=True,
                    runtime="python",
                    archive_format="default",
                    config_file=str(config_file),
                )
            )
        config_file.unlink()
        names.append(name)
    return names
