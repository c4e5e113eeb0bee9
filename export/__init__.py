"""Export of a checkpoint to the bundle that is served.

Its graphs, in ONNX and TorchScript, are compared with the model before the bundle is complete.
"""
