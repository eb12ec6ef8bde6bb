"""A mixture attached to a loaded model."""
