"""Candidate sources: one file each, one protocol."""
