"""From a folder of images to a served gate: ``ade fit``.

It joins the other packages, and decides what can be decided.
"""
