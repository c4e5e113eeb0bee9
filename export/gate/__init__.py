"""The verdict of a bundle: fitted, calibrated and measured."""
