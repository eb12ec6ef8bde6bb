"""The published merge methods, a file per family, and their table."""
