"""Judges whether an image is out-of-distribution, with a calibrated error rate."""
