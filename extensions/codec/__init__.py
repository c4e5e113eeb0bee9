"""Lossless coding of images with a bundle's model, to the size that their likelihood promises."""
