"""``ade fit``: from a folder of images to a served gate.

The package joins training, export and serving, and decides what the user need not.
"""
