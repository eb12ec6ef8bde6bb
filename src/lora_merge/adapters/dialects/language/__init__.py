"""Adapters that other trainers of language models write: mlx-lm, torchtune."""
