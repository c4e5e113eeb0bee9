"""AV-ADE: a variational autoencoder on the features of an invertible network.

Start with :mod:`ade_model.model`. Lucas, Shmelkov, Alahari, Schmid and Verbeek, "Adaptive Density
Estimation for Generative Models", NeurIPS 2019.
"""

from ade_base.errors import ConfigError
from ade_model.config import ModelConfig
from ade_model.errors import ShapeError
from ade_model.model import ADEModel

__all__ = ["ADEModel", "ConfigError", "ModelConfig", "ShapeError"]
