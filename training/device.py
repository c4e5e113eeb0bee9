"""The device that training and measuring compute on."""

from __future__ import annotations

import torch

from ade_base.system import available_cores
from training.runs import RunError

DEVICES = ("auto", "cpu", "cuda")


def choose_device(name: str) -> torch.device:
    """Choose the device, and turn TF32 off so that float32 is float32 on it.

    PyTorch gets no more threads than this process has cores: it does not know a container's limit.

    Args:
        name: one of :data:`DEVICES`; ``auto`` is a GPU where there is one.

    Raises:
        RunError: ``cuda`` is requested and PyTorch finds no GPU.
    """
    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise RunError("device cuda: PyTorch finds no CUDA device on this machine")
    torch.backends.cudnn.allow_tf32 = False
    torch.set_num_threads(min(torch.get_num_threads(), available_cores()))
    return torch.device("cuda" if name != "cpu" and has_gpu else "cpu")


def bfloat16_is_faster(device: str) -> bool:
    """Whether networks run faster in bfloat16 than in float32 on this machine.

    Processors without instructions for bfloat16 emulate it, at a fraction of the speed.

    Args:
        device: ``cpu`` or ``cuda``.
    """
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(
        torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        and torch.cpu._is_avx512_bf16_supported()
    )
