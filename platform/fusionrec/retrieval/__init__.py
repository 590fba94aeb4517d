"""Vector index and item–item neighbours."""
