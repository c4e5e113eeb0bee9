"""Scores any number of image files on several machines, with Ray Data."""
