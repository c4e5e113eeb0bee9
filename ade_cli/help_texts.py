"""Help of the arguments that several verbs have."""

from __future__ import annotations

BUNDLE = "folder of a bundle; pretrained/cifar10 is the shipped one, in any folder"
RUN_OR_BUNDLE = "a run, one of its checkpoints, or a bundle"
DEVICE = "device to compute on; auto takes a GPU if there is one (default: auto)"
KIND = "mean: the decoder's mean; density: with its noise (default: %(default)s)"
