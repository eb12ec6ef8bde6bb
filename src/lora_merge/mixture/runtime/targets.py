"""The model's modules that the experts adapt, by whatever names the two call them."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lora_merge.adapters.access.live_modules import linear_shape
from lora_merge.adapters.dialects.spelling import canonical
from lora_merge.adapters.forms import ModuleSpec
from lora_merge.errors import AlignmentError
from lora_merge.mixture.mixture import Mixture
from lora_merge.mixture.runtime.moe import router
from lora_merge.mixture.runtime.moe.experts import is_stack, projection_of, projections, shape_of

_ROUTER = "is the router of a MoE layer:"
MISFIT = "the experts do not fit the model"

# What transformers 4 called the parts of a model that sees, and what 5 calls them.
_MOVED = (
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head", "lm_head"),
    (r"^(vision_tower|multi_modal_projector|visual|vision_model|connector)\.", r"model.\1."),
    (r"^model\.(layers|embed_tokens|norm)\b", r"model.language_model.\1"),
    (r"\.block_sparse_moe\.", ".mlp."),
)


def without_wrappers(model: nn.Module) -> nn.Module:
    """The model itself, if it was compiled as a whole."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model


def find_targets(model: nn.Module, mixture: Mixture) -> dict[str, nn.Module]:
    """The model's modules that the experts adapt, by the experts' names for them.

    A body without its head, a head around the body that the experts were trained on, and the parts
    of models that see, whose names have moved, shift all names; that is followed, as long as one
    shift finds modules of the right shapes for all names, and no other does.

    Raises:
        AlignmentError: Listing every module that the model lacks, or that has another shape.
    """
    names = mixture.modules
    table = _table(model)
    specs = {module.name: module.first for module in mixture.alignment.modules}
    found: list[Sequence[str]] = []
    for way in _ways(names, table, getattr(model, "base_model_prefix", "")):
        if all(name in table for name in way) and list(way) not in found:
            found.append(list(way))
            if way is names:
                break
    called = [dict(zip(names, way, strict=True)) for way in found]
    fitting = [way for way in called if not _faults(specs, way, table)]
    if len(fitting) > 1:
        shown = [f"{names[0]} may be {' or '.join(way[names[0]] for way in fitting)}"]
        raise AlignmentError(shown, "rename the experts' modules", what=MISFIT)
    if not found:
        missing = [name for name in names if name not in table]
        shown = [f"the model has no module {name}" for name in missing[:6]]
        if len(missing) > 6:
            shown.append(f"and {len(missing) - 6} more of {len(names)}")
        base = mixture.alignment.base_model
        if any(_is_stacked(name, table) for name in missing):
            shown.insert(0, "the model holds its MoE experts in a stack that cannot be entered")
            raise AlignmentError(shown, "train the adapters without the MoE experts", what=MISFIT)
        remedy = f"load the experts' base model ({base or 'not named'})"
        raise AlignmentError(shown, remedy, what=MISFIT)
    chosen = (fitting or called)[0]
    faults = _faults(specs, chosen, table)
    if faults:
        remedy = "load the base model the experts were trained on"
        if all(_ROUTER in fault for fault in faults):
            remedy = "leave the routers out of the adapters"
        raise AlignmentError(faults[:8], remedy, what=MISFIT)
    return {name: table[there] for name, there in chosen.items()}


def _table(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by their names without wrappers; the outermost of those that share one."""
    table: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        table.setdefault(canonical(name), module)
        if is_stack(module):
            inside = (f"{canonical(name)}.{leaf}" for leaf in projections(module))
            table.update((place, module) for place in inside if place not in table)
    return table


def _ways(names: list[str], table: Mapping[str, object], prefix: str) -> Iterator[list[str]]:
    """What the model may call the modules: as they are, or all shifted alike."""
    yield names
    if prefix:
        yield [f"{prefix}.{name}" for name in names]
        if all(name.startswith(f"{prefix}.") for name in names):
            yield [name.removeprefix(f"{prefix}.") for name in names]
    yield [_moved(name, table) for name in names]
    for strip in ("", "model."):
        if all(name.startswith(strip) for name in names):
            tail = "." + names[0].removeprefix(strip)
            for there in table:
                if there.endswith(tail):
                    add = there.removesuffix(tail[1:])
                    yield [add + name.removeprefix(strip) for name in names]


def _moved(name: str, table: Mapping[str, object]) -> str:
    """The new name of a module, if it has moved."""
    if name in table:
        return name
    ways = (re.sub(old, new, name) for old, new in _MOVED)
    return next((way for way in ways if way in table), name)


def _is_stacked(name: str, table: Mapping[str, nn.Module]) -> bool:
    """Whether a model holds as one parameter what the experts adapt one by one."""
    stack = re.match(r"(.*\.)(block_sparse_moe|mlp)\.experts\.\d+\.", name)
    return stack is not None and f"{stack[1]}mlp.experts" in table


def _faults(
    specs: Mapping[str, ModuleSpec], way: Mapping[str, str], table: Mapping[str, nn.Module]
) -> list[str]:
    found = (
        _unheard(name, way[name], table) or _misfit(spec, table[way[name]])
        for name, spec in specs.items()
    )
    return [fault for fault in found if fault]


def _unheard(name: str, there: str, table: Mapping[str, nn.Module]) -> str | None:
    """Whether a module is in a router that never calls it, in words."""
    parent = table.get(there.rpartition(".")[0])
    if parent is None or not router.reads_weight_of(parent, table[there]):
        return None
    kind = type(parent).__name__
    return f"{name} {_ROUTER} a {kind}, which reads its weight and does not call it"


def _misfit(spec: ModuleSpec, target: nn.Module) -> str | None:
    """What does not fit between an adapted module and the model's, in words."""
    if router.is_router(target):
        reason = router.refusal_of(target)
        if reason:
            return f"{spec.name} {_ROUTER} {reason}"
        have = router.shape_of(target)
    elif is_stack(target):
        have = shape_of(target, projection_of(target, spec.name))
    elif spec.form == "conv":
        if getattr(target, "groups", 1) != 1 or getattr(target, "padding_mode", "zeros") != "zeros":
            return f"{spec.name}: a grouped or unusually padded convolution"
        if not isinstance(target, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            return f"{spec.name}: a convolution's factors, but the model has {_kind(target)}"
        have = (target.out_channels, target.in_channels * target.weight[0, 0].numel())
    elif spec.form == "embedding":
        if not isinstance(target, nn.Embedding):
            return f"{spec.name}: an embedding's factors, but the model has {_kind(target)}"
        have = (target.embedding_dim, target.num_embeddings)
    else:
        if isinstance(target, (nn.Embedding, nn.Conv2d, nn.Conv3d)):
            return f"{spec.name}: a linear layer's factors, but the model has {_kind(target)}"
        have = linear_shape(target) or (spec.d_out, spec.d_in)
    if have != (spec.d_out, spec.d_in):
        return f"{spec.name}: experts {spec.d_out} x {spec.d_in}, the model {have[0]} x {have[1]}"
    return None


def device_of(target: nn.Module, model: nn.Module) -> torch.device:
    """Where a module computes; offloaded weights lie elsewhere, or nowhere, until it is called."""
    hook: Any = getattr(target, "_hf_hook", None)  # accelerate's
    for each in getattr(hook, "hooks", (hook,)):
        device = getattr(each, "execution_device", None)
        if device is not None and getattr(each, "offload", False):
            return torch.device(device if not isinstance(device, int) else f"cuda:{device}")
    tensors = (*target.parameters(), *target.buffers(), *model.parameters())
    there = [tensor.device for tensor in tensors if tensor.device.type != "meta"]
    return there[0] if there else torch.device("cpu")


def _kind(target: nn.Module) -> str:
    return f"a {type(target).__name__}"
