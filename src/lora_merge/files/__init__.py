"""Bytes on disk and on the Hub; knows nothing of LoRA."""
