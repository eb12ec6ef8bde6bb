"""Pure functions from stored tensors to rank-one units, one per way of storing a low-rank delta."""
