"""An adapter in a loaded model's weights, for as long as a block runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora_merge.adapters.access.live_modules import is_conv1d
from lora_merge.adapters.adapter import Adapter
from lora_merge.adapters.aligned_module import AlignedModule
from lora_merge.adapters.alignment import align, read_stacks
from lora_merge.errors import AlignmentError

_MISFIT = "the adapter does not fit the model"


@contextmanager
def applied(model: nn.Module, adapter: Adapter) -> Iterator[None]:
    """Add an adapter's deltas, and put its whole tensors in place; afterwards the same bits again.

    Args:
        model: A loaded model, unquantised.
        adapter: Linear modules, GPT-2's Conv1D, convolutions, embeddings and stacked experts.

    Memory is a copy of the weights that change.

    Raises:
        AlignmentError: Listing every module that the model lacks or that has another shape;
            nothing is changed then.

    Examples:
        >>> from transformers import AutoModelForCausalLM
        >>> import lora_merge
        >>> model = AutoModelForCausalLM.from_pretrained("examples/base")
        >>> before = model.lm_head.weight.clone()
        >>> with applied(model, lora_merge.open_adapter("examples/adapters/upper")):
        ...     pass
        >>> bool((model.lm_head.weight == before).all())
        True
    """
    alignment = align([adapter])
    targets = {module.name: _target(model, module) for module in alignment.modules}
    whole = {name: _find(model, name) for name in adapter.extras}
    faults = [
        f"{module.name}: {_shape(targets[module.name])}, the adapter's is "
        f"{module.first.d_out} x {module.first.d_in}"
        for module in alignment.modules
        if not _fits(targets[module.name], module)
    ]
    faults += [
        f"{name}: {_shape(parameter)}, the adapter's is {adapter.extras[name].shape}"
        for name, parameter in whole.items()
        if parameter is None or tuple(parameter.shape) != adapter.extras[name].shape
    ]
    faults += [
        f"{module.name}: no bias in the model, the adapter changes it"
        for module in alignment.modules
        if module.first.key_bias is not None and _find(model, f"{module.name}.bias") is None
    ]
    if faults:
        raise AlignmentError(faults, "take the adapter's base model", what=_MISFIT)
    saved: list[tuple[Tensor, Tensor]] = []

    def change(parameter: Tensor, value: Tensor) -> None:
        saved.append((parameter, parameter.detach().clone()))
        parameter.copy_(value)

    try:
        with torch.no_grad():
            for name, parameter in whole.items():
                assert parameter is not None
                change(parameter, adapter.read_extra(name))
            for module in alignment.modules:
                weight = targets[module.name]
                assert weight is not None
                change(weight, _changed(alignment, module, weight, model))
                bias = adapter.read_bias(module.name)
                if bias is not None:
                    stored = _find(model, f"{module.name}.bias")
                    assert stored is not None
                    change(stored, stored + bias.to(stored))
        yield
    finally:
        with torch.no_grad():
            for parameter, before in reversed(saved):
                parameter.copy_(before)


def _changed(alignment: Any, module: AlignedModule, weight: Tensor, model: nn.Module) -> Tensor:
    """The weight with the delta in it, in float32 at least."""
    deltas = torch.stack([s.delta() for s in read_stacks(alignment, module, device=weight.device)])
    spec = module.first
    if _lies_transposed(model, module, weight):
        deltas = deltas.mT
    total = weight.to(torch.promote_types(weight.dtype, torch.float32))
    shaped = deltas if spec.form == "experts" else deltas[0]
    return total + shaped.reshape(weight.shape).to(total.dtype)


def _lies_transposed(model: nn.Module, module: AlignedModule, weight: Tensor) -> bool:
    spec = module.first
    if spec.form == "embedding":
        return True
    if spec.form == "conv":
        return False
    if spec.form == "experts":
        return tuple(weight.shape[1:]) != (spec.d_out, spec.d_in)
    return is_conv1d(model.get_submodule(module.name))


def _fits(weight: Tensor | None, module: AlignedModule) -> bool:
    spec = module.first
    if weight is None or not weight.is_floating_point():
        return False
    size = spec.num_experts * spec.d_out * spec.d_in
    sides = {spec.d_out, spec.d_in}
    if spec.form == "conv":
        return weight.numel() == size and weight.shape[0] == spec.d_out
    return weight.numel() == size and set(weight.shape[-2:]) == sides


def _shape(tensor: Tensor | None) -> str:
    return "not in the model" if tensor is None else f"{tuple(tensor.shape)} in the model"


def _target(model: nn.Module, module: AlignedModule) -> Tensor | None:
    """The parameter that a module's delta is added to."""
    if module.first.form == "experts":
        return _find(model, module.name)
    return _find(model, f"{module.name}.weight")


def _find(model: nn.Module, name: str) -> Tensor | None:
    owner, _, leaf = name.rpartition(".")
    try:
        found = getattr(model.get_submodule(owner), leaf, None)
    except AttributeError:
        return None
    return found if isinstance(found, Tensor) else None
