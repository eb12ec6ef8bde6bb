"""Adapters inside a live PEFT model: read from it and put into it, without touching the disk."""

from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from lora_merge.adapters.dialects.spelling import PREFIX
from lora_merge.adapters.module_names import unwrapped
from lora_merge.errors import AlignmentError, LoraMergeError, MethodError


def is_peft(model: object) -> bool:
    """Whether it is a live PEFT model; imports nothing to find out."""
    return isinstance(model, nn.Module) and isinstance(getattr(model, "peft_config", None), dict)


def live_names(model: nn.Module) -> list[str]:
    """Names of the adapters that a PEFT model carries, in the order they were added."""
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    return list(configs)


def read_live(model: nn.Module, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, tensors) of one adapter, as `save_pretrained` would write them.

    The tensors are copies on the CPU, so that training may go on. A resized embedding of the base
    is the base's and is not among them.

    Raises:
        MethodError: If the model has no adapter of that name.
        LoraMergeError: If PEFT cannot give its tensors.
    """
    if name not in live_names(model):
        raise MethodError(
            f"the model has no adapter {name!r}", f"it has: {', '.join(live_names(model))}"
        )
    from peft import get_peft_model_state_dict

    configs: Any = model.peft_config
    try:
        found = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    except Exception as error:  # of many kinds, by how the model is sharded
        raise LoraMergeError(
            f"{name}: PEFT cannot give its tensors: {error}",
            "save it in PEFT, name the folder",
        ) from error
    tensors = {key: tensor.detach().to("cpu", copy=True) for key, tensor in found.items()}
    return {key: _plain(value) for key, value in configs[name].to_dict().items()}, tensors


def put_live(
    model: nn.Module, name: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor], who: str
) -> Any:
    """Put an adapter into a model: beside the others of a PEFT model, or around a plain one.

    Args:
        model: The model; a failure leaves it as it was.
        name: What PEFT shall call the adapter.
        config: Its `adapter_config.json`.
        tensors: Its tensors, named as in its file.
        who: Its name, for messages.

    Returns:
        The `PeftModel`.

    Raises:
        MethodError: If the model has an adapter of that name.
        AlignmentError: If a tensor has no place in the model; names every one.
        LoraMergeError: If PEFT is not installed, or refuses.
    """
    try:
        from peft import LoraConfig, PeftModel, set_peft_model_state_dict
    except ModuleNotFoundError as error:
        raise LoraMergeError("this needs PEFT", "pip install 'lora-merge[peft]'") from error
    if name in live_names(model):
        raise MethodError(f"the model has an adapter {name!r}", "give another name")
    if hasattr(nn.ModuleDict(), name) or "." in name or not name:
        raise MethodError(  # PEFT would fail half-way, and leave the model broken
            f"PEFT cannot call an adapter {name!r}: torch's modules have that name for something",
            "give another name",
        )
    if is_peft(model) and not isinstance(model, PeftModel):
        raise MethodError(
            "the model has adapters, but PEFT's wrapper is not around it", "pass the PeftModel"
        )
    missing = _missing(model, tensors)
    if missing:
        raise AlignmentError(
            missing[:8], "take the adapter's base model", what=f"{who} does not fit the model"
        )
    chosen = LoraConfig(**{k: v for k, v in config.items() if k != "peft_type" and v is not None})
    inside = isinstance(model, PeftModel)
    try:
        if inside:
            wrapped: Any = model
            wrapped.add_adapter(name, chosen)
        else:
            wrapped = PeftModel(model, chosen, adapter_name=name)
            wrapped.eval()
    except ValueError as error:
        raise LoraMergeError(f"{who}: PEFT refuses it: {error}", "take its base model") from error
    try:
        result: Any = set_peft_model_state_dict(wrapped, dict(tensors), adapter_name=name)
        unplaced = list(result.unexpected_keys)
    except RuntimeError as error:  # shapes that differ
        unplaced = [str(error)]
    if unplaced:
        wrapped.delete_adapter(name) if inside else wrapped.unload()
        raise AlignmentError(
            unplaced[:8], "take the adapter's base model", what=f"{who} does not fit the model"
        )
    for key, parameter in wrapped.named_parameters():
        if f".{name}." in key:
            parameter.requires_grad_(False)
    return wrapped


def _missing(model: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """Modules that the tensors adapt and the model does not have; PEFT would skip them silently."""
    live: Any = model
    base = live.get_base_model() if is_peft(model) else model
    modules = {name for name, _ in base.named_modules()}
    wanted = {
        unwrapped(key.removeprefix(PREFIX).partition(".lora_")[0])
        for key in tensors
        if ".lora_" in key
    }
    return sorted(f"the model has no module {name}" for name in wanted - modules)


def _plain(value: Any) -> Any:
    """A config's value as JSON has it."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return value
