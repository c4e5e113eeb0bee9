"""Stands in for PyTorch in workers that compute with ONNX Runtime on the CPU.

TorchServe's worker imports PyTorch for one thing alone: to know whether an answer is a tensor,
which ours never are. That costs each worker about 120 MB and more than a second of its start.
"""


class Tensor:
    """No answer is one."""
