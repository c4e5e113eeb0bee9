"""The backends that compute a bundle's graphs: ONNX Runtime and TorchScript."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from ade_base.errors import UserError
from ade_base.system import onnx_runtime
from serving.engine.bundle import TORCHSCRIPT_NAME, WEIGHTS_NAME, Bundle
from serving.engine.cuda import BoundGraph
from serving.engine.signatures import inputs_of, outputs_of

BACKENDS = ("onnxruntime", "torchscript")
DEVICES = ("auto", "cpu", "cuda")


class BackendError(UserError, RuntimeError):
    """The backend cannot run on this machine with these options."""


class Backend(Protocol):
    """Runs the graphs of one bundle.

    Attributes:
        name: reported in answers, such as ``onnxruntime/CPUExecutionProvider``.
        fixed_sizes: whether batches should have few different sizes, because each new size is
            expensive.
    """

    name: str
    fixed_sizes: bool

    def run(
        self, graph: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str] | None = None
    ) -> dict[str, np.ndarray]:
        """Compute one batch; returns the ``wanted`` outputs, or all of them.

        :mod:`serving.engine.signatures` lists the names of inputs and outputs.
        """
        ...


def load_backend(
    bundle: Bundle,
    graphs: Sequence[str],
    backend: str,
    device: str,
    gpu: int = 0,
    cuda_graphs: bool = False,
) -> Backend:
    """Load the graphs of a bundle.

    Args:
        bundle: its files are verified before they are loaded.
        graphs: names of graphs in the bundle.
        backend: one of :data:`BACKENDS`.
        device: one of :data:`DEVICES`. ``auto`` uses a GPU if there is one, ``cuda`` requires it.
        gpu: index of the GPU.
        cuda_graphs: record the kernels of each batch size and replay them (ONNX Runtime on a GPU).

    Raises:
        BackendError: the backend or device is unknown, or the required GPU is missing.
        BundleError: a file does not match the manifest.
    """
    if device not in DEVICES:
        raise BackendError(f"device must be one of {', '.join(DEVICES)}, got {device!r}")
    if backend == "onnxruntime":
        return OnnxRuntimeBackend(bundle, graphs, device, gpu, cuda_graphs)
    if backend == "torchscript":
        return TorchScriptBackend(bundle, graphs, device, gpu)
    raise BackendError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")


class OnnxRuntimeBackend:
    """ONNX Runtime with one session per graph and a single thread.

    With several threads the order of sums, and so the bytes of answers, could differ. Graphs are
    optimised when they are loaded: storing optimised graphs would save only 2 to 9 ms per graph,
    and the fastest layout depends on the processor.
    """

    def __init__(
        self,
        bundle: Bundle,
        graphs: Sequence[str],
        device: str,
        gpu: int,
        cuda_graphs: bool,
    ) -> None:
        ort = onnx_runtime()

        provider = "CPUExecutionProvider"
        if device != "cpu" and has_cuda_provider() and _gpu_is_there(ort):
            provider = "CUDAExecutionProvider"
        elif device == "cuda":
            raise BackendError(
                "device cuda: ONNX Runtime finds no CUDA device "
                "(are onnxruntime-gpu and the NVIDIA driver installed?)"
            )
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        cuda = {
            "device_id": gpu,
            "use_tf32": 0,
            "cudnn_conv_algo_search": "HEURISTIC",
            "enable_cuda_graph": int(cuda_graphs),
        }
        providers: list[Any] = [(provider, cuda)] if provider.startswith("CUDA") else []
        providers.append("CPUExecutionProvider")
        bundle.file(WEIGHTS_NAME)  # verified here, because the graphs read it by themselves
        self._sessions = {}
        for graph in graphs:
            session = ort.InferenceSession(
                bundle.file(f"{graph}.onnx"), options, providers=providers
            )
            if session.get_providers()[0] != provider:
                raise BackendError(
                    f"{graph}.onnx must run on {provider}, but ONNX Runtime chose "
                    f"{session.get_providers()[0]}"
                )
            self._sessions[graph] = session
        self._outputs = {
            graph: [o.name for o in s.get_outputs()] for graph, s in self._sessions.items()
        }
        self._bound = {
            graph: BoundGraph(session, "cuda", gpu, cuda_graphs)
            for graph, session in self._sessions.items()
            if provider.startswith("CUDA")
        }
        self.name = f"onnxruntime/{provider}"
        self.fixed_sizes = bool(self._bound)

    def run(
        self, graph: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str] | None = None
    ) -> dict[str, np.ndarray]:
        names = wanted or self._outputs[graph]
        if graph in self._bound:
            return self._bound[graph].run(inputs, names)
        return dict(zip(names, self._sessions[graph].run(names, dict(inputs)), strict=True))


def has_cuda_provider() -> bool:
    """Whether the installed ONNX Runtime is the one for GPUs."""
    return "CUDAExecutionProvider" in onnx_runtime().get_available_providers()


def _gpu_is_there(ort: Any) -> bool:
    """Whether a session on the GPU can start.

    ONNX Runtime lists its CUDA provider even on machines without a GPU.
    """
    import torch

    if not torch.cuda.is_available():
        return False
    ort.preload_dlls()  # the CUDA and cuDNN libraries of the PyTorch packages
    return True


class TorchScriptBackend:
    """The same graphs from ``model.ts``, which is loaded only if its hash matches the manifest."""

    fixed_sizes = True  # the profiling executor compiles again for each new size

    def __init__(self, bundle: Bundle, graphs: Sequence[str], device: str, gpu: int) -> None:
        import torch

        if device == "cuda" and not torch.cuda.is_available():
            raise BackendError("device cuda: PyTorch finds no CUDA device")
        on_gpu = device != "cpu" and torch.cuda.is_available()
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        if not on_gpu:
            torch.set_num_threads(1)
        self._torch = torch
        self._device = torch.device("cuda", gpu) if on_gpu else torch.device("cpu")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # TorchScript itself is deprecated
            self._module = torch.jit.load(bundle.file(TORCHSCRIPT_NAME), map_location=self._device)
        self._levels = len(bundle.latent_shapes)
        self._graphs = set(graphs)
        self.name = f"torchscript/{self._device}"

    def run(
        self, graph: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str] | None = None
    ) -> dict[str, np.ndarray]:
        if graph not in self._graphs:
            raise BackendError(f"graph {graph} was not loaded")
        torch = self._torch
        args = [
            torch.from_numpy(inputs[name]).to(self._device)
            for name in inputs_of(graph, self._levels)
        ]
        with torch.inference_mode():
            values = getattr(self._module, graph)(*args)
        if not isinstance(values, tuple):
            values = (values,)
        return {
            name: value.cpu().numpy()
            for name, value in zip(outputs_of(graph, self._levels), values, strict=True)
            if wanted is None or name in wanted
        }
