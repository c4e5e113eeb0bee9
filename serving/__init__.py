"""Everything that serves a bundle: the engine, the HTTP contract, the client and the web page.

Needs only a bundle and works on NumPy arrays. Does not import the model's or the training code.
"""
