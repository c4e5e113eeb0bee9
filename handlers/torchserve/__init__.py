"""Everything that knows TorchServe: handlers, archives, configuration, start, stop and status."""
