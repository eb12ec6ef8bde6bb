"""Pairs of adapters for a terminal: the angles between two, the neighbours of each."""
