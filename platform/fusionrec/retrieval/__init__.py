"""Vector index, item-item neighbours, and the union of candidates."""
