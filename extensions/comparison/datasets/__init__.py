"""Data sets of the paper and of its comparisons: STL-10, ImageNet at 64 pixels, LSUN."""
