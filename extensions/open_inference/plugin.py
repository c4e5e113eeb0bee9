"""The Open Inference Protocol (V2) at ``/v2``, as KServe and Triton speak it."""

from ade_base.extensions import Extension

EXTENSION = Extension(protocols={"v2": "extensions.open_inference.translation"})
