"""Trained weights that lie beside an adapter's file and are no part of it."""

from pathlib import Path

# File name's beginning → what wrote it.
_KNOWN = {
    "non_lora_trainables": "trained weights of a multimodal model (LLaVA)",
    "value_head": "a value head (TRL)",
    "v_head": "a value head (TRL)",
    "new_embeddings": "rows for new tokens",
    "trainable_params": "trained embeddings and norms (LongLoRA)",
    "mm_projector": "a trained projector (LLaVA)",
}
_WEIGHTS = (".bin", ".safetensors", ".pt", ".pth")


def leftovers(weights: Path) -> list[str]:
    """One note for each file beside the weights that was trained with them.

    Args:
        weights: The adapter's weights file.
    """
    beside = sorted(p.name for p in weights.parent.iterdir() if p.suffix in _WEIGHTS)
    return [
        f"{name} lies beside the adapter and is no part of it: {what}, not read and not merged"
        for name in beside
        for start, what in _KNOWN.items()
        if name.startswith(start) and name != weights.name
    ]
