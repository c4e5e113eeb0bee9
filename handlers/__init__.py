"""TorchServe adapters: one model an operation. They translate, and nothing more."""
