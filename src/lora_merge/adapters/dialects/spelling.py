"""Names of one weight under the wrappers that training code puts around a model."""

PREFIX = "base_model.model."

# What torch.compile, FSDP, activation checkpointing and data parallelism add to every name.
_WRAPPERS = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))


def canonical(name: str) -> str:
    """A name without wrappers: the base model's own.

    Examples:
        >>> canonical("module.base_model.model.model.layers.0._orig_mod.mlp.up_proj")
        'model.layers.0.mlp.up_proj'
    """
    bare = name.removeprefix(PREFIX)
    if not bare.startswith(("module.", PREFIX)) and not any(word in bare for word in _WRAPPERS):
        return bare  # nearly all names: no need to take them apart
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    # DistributedDataParallel and DeepSpeed wrap the whole model, so theirs stands first alone.
    while parts[:1] == ["module"] or parts[:2] == ["base_model", "model"]:
        parts = parts[1:] if parts[0] == "module" else parts[2:]
    return ".".join(parts)


def count_wraps(name: str) -> int:
    """How many times PEFT's own prefix stands before a name."""
    wraps = 0
    while name.startswith(PREFIX):
        name = name.removeprefix(PREFIX)
        wraps += 1
    return wraps
