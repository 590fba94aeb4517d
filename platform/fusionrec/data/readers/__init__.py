"""One reader a raw format; each yields batches of the one schema."""
