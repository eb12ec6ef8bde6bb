"""The modules that a mixture wraps: their experts, their gates, and what runs them."""
