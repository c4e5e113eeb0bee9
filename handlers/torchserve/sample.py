"""TorchServe's entry point for ``sample``. It wants exactly one class in this file."""

from handlers.torchserve import base


class SampleHandler(base.OperationHandler):
    """See :class:`handlers.torchserve.base.OperationHandler`."""

    operation = "sample"
