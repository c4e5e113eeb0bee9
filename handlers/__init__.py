"""The engines of the service, one folder each; they share ``front`` and ``launch``."""
