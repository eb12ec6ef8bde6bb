"""Experts that come and go while a mixture is attached."""
