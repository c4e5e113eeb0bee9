"""Training of AV-ADE and of the systems it is compared with.

Modules in an order for reading:

* a run: :mod:`~training.recipes` (the systems), :mod:`~training.config`, :mod:`~training.loop`,
  :mod:`~training.budget`, :mod:`~training.step`, :mod:`~training.losses`,
  :mod:`~training.evaluate`
* adversarial parts: :mod:`~training.discriminator`, :mod:`~training.projected`,
  :mod:`~training.augment`
* a run's folder: :mod:`~training.run_start`, :mod:`~training.runs`, :mod:`~training.run_log`,
  :mod:`~training.report`
* the verdict's encoder: :mod:`~training.encoder`, :mod:`~training.small_encoder`,
  :mod:`~training.encoder_network`, :mod:`~training.distillation`, :mod:`~training.labels`
"""
