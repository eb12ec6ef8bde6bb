"""Merging: methods on stacks, and the executor that streams modules through them."""
