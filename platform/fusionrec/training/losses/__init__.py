"""Losses of the language models: pure functions on tensors, one file each."""
