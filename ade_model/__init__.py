"""AV-ADE: a variational autoencoder on the features of an invertible network.

Start with :mod:`ade_model.model`. Lucas, Shmelkov, Alahari, Schmid and Verbeek, "Adaptive Density
Estimation for Generative Models", NeurIPS 2019.
"""
