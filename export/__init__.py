"""A checkpoint to the bundle that is served: graphs as ONNX and TorchScript, proven equal to the
model.
"""
