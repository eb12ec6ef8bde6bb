"""Training gates and experts."""
