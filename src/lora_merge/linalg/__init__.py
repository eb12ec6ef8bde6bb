"""Small dense algebra on factors; knows tensors, not adapters."""
