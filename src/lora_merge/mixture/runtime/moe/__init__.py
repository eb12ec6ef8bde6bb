"""Mixtures inside MoE layers: the base's own experts, and the routers that choose them."""
