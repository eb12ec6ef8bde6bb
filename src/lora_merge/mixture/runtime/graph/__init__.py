"""Decoding steps recorded as graphs, and replayed."""
