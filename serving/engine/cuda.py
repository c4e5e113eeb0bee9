"""ONNX Runtime sessions with fixed buffers on the device.

On CUDA, copies and kernel launches are the main cost. Inputs are copied into the same buffers for
every batch, and outputs are read from the same buffers. With ``capture``, ONNX Runtime records the
kernels of each batch size once as a CUDA graph and replays them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ade_base.system import onnx_runtime

NO_CAPTURE = -1  # the graph id with which ONNX Runtime does not record a run


@dataclass(frozen=True)
class _Buffers:
    binding: Any
    inputs: dict[str, Any]
    outputs: dict[str, Any]


class BoundGraph:
    """One session with one set of buffers per batch size. Callers use few batch sizes.

    Args:
        session: an ``onnxruntime.InferenceSession`` on the device.
        device: ``cuda``; tests use ``cpu``.
        gpu: index of the GPU.
        capture: record CUDA graphs. The session must have been created with ``enable_cuda_graph``.
    """

    def __init__(self, session: Any, device: str, gpu: int, capture: bool) -> None:
        self._session = session
        self._device = device
        self._gpu = gpu
        self._capture = capture
        self._buffers: dict[int, _Buffers] = {}

    def run(self, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
        """Compute one batch and copy back only the ``wanted`` outputs."""
        size = len(next(iter(inputs.values())))
        if size not in self._buffers:
            self._buffers[size] = self._allocate(inputs)
        buffers = self._buffers[size]
        for name, value in inputs.items():
            buffers.inputs[name].update_inplace(np.ascontiguousarray(value))
        self._session.run_with_iobinding(buffers.binding, self._options(size))
        return {name: np.array(buffers.outputs[name].numpy()) for name in wanted}

    def _allocate(self, inputs: Mapping[str, np.ndarray]) -> _Buffers:
        """Run once with outputs that ONNX Runtime allocates, and keep those as the buffers."""
        ort = onnx_runtime()

        binding = self._session.io_binding()
        # Copy, because on the CPU ONNX Runtime would use the caller's arrays as its buffers.
        places = {
            name: ort.OrtValue.ortvalue_from_numpy(
                np.array(value, order="C"), self._device, self._gpu
            )
            for name, value in inputs.items()
        }
        for name, place in places.items():
            binding.bind_ortvalue_input(name, place)
        names = [output.name for output in self._session.get_outputs()]
        for name in names:
            binding.bind_output(name, self._device, self._gpu)
        self._session.run_with_iobinding(binding, self._options(NO_CAPTURE))
        outputs = dict(zip(names, binding.get_outputs(), strict=True))
        for name, place in outputs.items():
            binding.bind_ortvalue_output(name, place)
        return _Buffers(binding, places, outputs)

    def _options(self, number: int) -> Any:
        ort = onnx_runtime()

        options = ort.RunOptions()
        if self._capture:
            options.add_run_config_entry("gpu_graph_id", str(number))
        return options
