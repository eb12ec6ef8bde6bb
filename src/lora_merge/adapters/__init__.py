"""Adapters on disk and as rank stacks: references, files, alignment, writing."""
