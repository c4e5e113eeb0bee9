"""Metrics of samples, one per file; each compares generated with held-out images."""
