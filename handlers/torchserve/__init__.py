"""The adapter for TorchServe: handlers, archives, configuration, start, stop and status."""
