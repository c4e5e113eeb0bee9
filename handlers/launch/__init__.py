"""What ``ade serve`` does whatever the engine: working folder, processes, page, stop."""
