"""Export to one TorchScript module with a method for each graph."""

from __future__ import annotations

import io
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch

from export.graphs import Graphs
from serving.engine.signatures import inputs_of


def export_torchscript(
    graphs: Graphs, examples: dict[str, dict[str, np.ndarray]], path: Path
) -> None:
    """Trace every graph and write one file, without paths of the sources.

    Args:
        graphs: float32, on the CPU.
        examples: inputs of each graph, by its name.
        path: of the file to write.
    """
    inputs = {
        name: tuple(torch.from_numpy(example[i]) for i in inputs_of(name, graphs.levels))
        for name, example in examples.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is deprecated, but this is its format
        traced = torch.jit.trace_module(graphs, inputs, check_trace=False)
        buffer = io.BytesIO()
        torch.jit.save(traced, buffer)
    _strip(buffer, path)


def _strip(source: io.BytesIO, path: Path) -> None:
    """Copy an archive without its debug files, which hold paths of the exporting machine.

    Records are stored uncompressed and aligned to 64 bytes, as the loader's memory map requires.
    """
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as new:
        for entry in old.infolist():
            if entry.filename.endswith(".debug_pkl"):
                continue
            info = zipfile.ZipInfo(entry.filename)
            header = 30 + len(entry.filename.encode())
            padding = -(new.fp.tell() + header + 4) % 64  # type: ignore[union-attr]  # the file is open
            info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
            new.writestr(info, old.read(entry))
