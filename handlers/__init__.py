"""Engines of the service, one folder each, and what they share: ``front`` and ``launch``."""
