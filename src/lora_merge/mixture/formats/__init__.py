"""Mixtures as directories, and other projects' checkpoints."""
