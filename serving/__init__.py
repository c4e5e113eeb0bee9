"""Serving a bundle: the engine, the wire contract, the client, the page and what starts them.

It works from a bundle alone, speaks NumPy, and knows neither the model's code nor training.
"""
