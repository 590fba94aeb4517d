"""Fusion: normalisation, segments, weights, and their vectorised objective."""
