"""Dialects: what the tensors of each family of files mean."""
