"""Gated mixtures of LoRA adapters at inference: gates, directories, attaching, training."""
