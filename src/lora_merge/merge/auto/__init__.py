"""What a merge decides from the adapters when it is not told: the method, the scale, weights."""
