"""Renames across families of diffusion models by diffusers' own converters (an extra)."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lora_merge.adapters.adapter import Adapter, build_adapter
from lora_merge.adapters.dialects.diffusion.names import split_name
from lora_merge.errors import AdapterError, LoraMergeError, MethodError
from lora_merge.files.checkpoint import Checkpoint
from lora_merge.files.tensor_file import TensorDict

_MIXIN = "LoraLoaderMixin"


def through_diffusers(
    adapter: Adapter, pipeline: str, *, base: Checkpoint | None = None
) -> Adapter:
    """An adapter as `load_lora_weights` of a pipeline would understand it, in memory.

    Args:
        adapter: In kohya's, ComfyUI's or another spelling that diffusers knows.
        pipeline: "StableDiffusion", "StableDiffusionXL", "Flux", "Wan", "QwenImage" ...: what
            stands before `LoraLoaderMixin` in `diffusers.loaders`.
        base: The unet's directory, whose config maps the blocks of an SDXL file.

    Raises:
        LoraMergeError: If diffusers is not installed.
        MethodError: If it has no such pipeline.
        AdapterError: If its converter does not know the file's names.
    """
    try:
        from diffusers.loaders import lora_pipeline
    except ImportError as error:
        raise LoraMergeError(
            "diffusers is not installed", "pip install 'lora-merge[diffusers]'"
        ) from error
    mixin: Any = getattr(lora_pipeline, f"{pipeline}{_MIXIN}", None)
    if mixin is None:
        known = sorted(n.removesuffix(_MIXIN) for n in dir(lora_pipeline) if n.endswith(_MIXIN))
        raise MethodError(f"diffusers has no pipeline {pipeline!r}", f"one of: {', '.join(known)}")
    tensors = {name: adapter.tensors.read(name) for name in adapter.tensors.entries()}
    options = {"unet_config": SimpleNamespace(**base.config)} if base is not None else {}
    try:
        result = mixin.lora_state_dict(tensors, **options)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise AdapterError(
            f"{adapter.name}: diffusers' converter for {pipeline} does not know these names "
            f"({error})",
            "name the pipeline that the adapter was made for",
        ) from error
    parts: tuple[Any, ...] = result if isinstance(result, tuple) else (result,)
    found: dict[str, Tensor] = dict(parts[0])
    for name, alpha in (parts[1] or {}).items() if len(parts) > 1 else ():
        place = split_name(name.removesuffix(".alpha"))  # its factor's name, or its module's
        key = name if place is None else f"{place[0]}.alpha"
        found[key] = torch.as_tensor(alpha, dtype=torch.float32)
    return build_adapter(adapter.name, None, TensorDict(found))
