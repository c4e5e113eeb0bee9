"""The device that training and measuring compute on."""

from __future__ import annotations

import torch

from training.runs import RunError

DEVICES = ("auto", "cpu", "cuda")


def choose_device(name: str) -> torch.device:
    """Choose the device, and turn TF32 off so that float32 is float32 on it.

    Args:
        name: one of :data:`DEVICES`; ``auto`` is a GPU where there is one.

    Raises:
        RunError: ``cuda`` is requested and PyTorch finds no GPU.
    """
    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise RunError("device cuda: PyTorch finds no CUDA device on this machine")
    torch.backends.cudnn.allow_tf32 = False
    return torch.device("cuda" if name != "cpu" and has_gpu else "cpu")
