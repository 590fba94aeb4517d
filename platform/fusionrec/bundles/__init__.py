"""Bundles: manifest, publish, verify, promote, roll back."""
