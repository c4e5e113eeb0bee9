"""Ray Serve as an engine of ``ade serve``, and the application of a Ray cluster."""
