"""Looking into adapters: plain results as frozen dataclasses, nothing printed."""
