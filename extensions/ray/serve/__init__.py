"""Ray Serve as an engine of ``ade serve``."""
