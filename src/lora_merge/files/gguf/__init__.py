"""GGUF, the container of llama.cpp."""
