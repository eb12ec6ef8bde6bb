"""Adapters of image and video models: kohya, LyCORIS, diffusers, ComfyUI."""
