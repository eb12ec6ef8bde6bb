"""What attaching leaves in a model: hooks on modules, on the body and on the state dict."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_merge.mixture.runtime.group import Group

REGISTRY = "lora_mixtures"  # the submodule that holds a model's mixtures


def body_of(model: nn.Module) -> nn.Module:
    """The transformer without its head: where a pass begins."""
    body = getattr(model, "base_model", model)
    return body if isinstance(body, nn.Module) else model


def module_hook(group: Group, index: int, *, in_place: bool) -> Any:
    """Forward hook that adds the experts of member `index` to what its module returns."""
    context = group.context

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        if not context.active or context.bypass:
            return None
        x = args[0] if args else next(iter(kwargs.values()))
        # Another hook may have kept the base's output: then it is not ours to write into.
        mine = in_place and len(module._forward_hooks) == 1
        return group.add(index, x, out, in_place=mine and not torch.is_grad_enabled())

    return hook


def last_tokens(mask: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The part of an attention mask that covers this call's tokens."""
    ids = kwargs.get("input_ids", kwargs.get("inputs_embeds", args[0] if args else None))
    return mask if ids is None else mask[:, -ids.shape[1] :]


def hide(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Keep the mixtures out of the base model's state dict; they save themselves."""
    for key in [key for key in state if key.startswith(f"{prefix}{REGISTRY}.")]:
        del state[key]
    matrices = {m.data_ptr() for each in getattr(module, REGISTRY).values() for m in each.matrices}
    for key, value in state.items():
        if isinstance(value, Tensor) and value.untyped_storage().data_ptr() in matrices:
            state[key] = value.clone(memory_format=torch.contiguous_format)  # files want it so


def forgive(module: nn.Module, keys: Any) -> None:
    """The same for loading: the base's file has no mixture in it, and need not."""
    missing = keys.missing_keys
    missing[:] = [key for key in missing if f"{REGISTRY}." not in key]
