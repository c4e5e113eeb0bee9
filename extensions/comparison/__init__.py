"""Comparison of several systems, trained under one budget and measured alike."""
