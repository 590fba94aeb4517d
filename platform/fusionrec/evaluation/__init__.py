"""Evaluation: metrics, slices, significance, report."""
