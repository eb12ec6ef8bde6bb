"""From a mixture on disk to members that can run in a given model."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_merge.adapters.aligned_module import AlignedModule
from lora_merge.adapters.alignment import read_stacks
from lora_merge.adapters.forms import ModuleSpec
from lora_merge.adapters.rank_stack import RankStack
from lora_merge.errors import AlignmentError, MethodError
from lora_merge.kernels.gated_stack.tune_cases import StackShape
from lora_merge.mixture.gates.gate import GateSpec
from lora_merge.mixture.gates.initial import svd_form
from lora_merge.mixture.gates.layer_norm import standardised_rows
from lora_merge.mixture.mixture import Mixture
from lora_merge.mixture.runtime.member import Member

_MISFIT = "the experts do not fit the model"

# Names of modules that read one tensor, as the model families call them.
_SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("q", "k", "v"),
    ("wi_0", "wi_1"),
    ("w1", "w3"),
)


def make_members(
    model: nn.Module, mixture: Mixture, dtype: torch.dtype | None
) -> tuple[list[Member], dict[str, nn.Module]]:
    """Read every module's stack and fit it to the model's module.

    Args:
        model: The model.
        mixture: The mixture.
        dtype: Of the experts; default: that of each target module.

    Returns:
        The members in name order, and the model's module of each by name.

    Raises:
        AlignmentError: Listing every module that the model lacks or that has another shape.
    """
    targets = find_targets(model, mixture)
    default = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    members = []
    numbers = {name: number for number, name in enumerate(mixture.modules)}
    for module in mixture.gated_modules:
        target = targets[module.name]
        weight = next(target.parameters(recurse=False), None)
        device = _device_of(target, model)
        floats = weight is not None and weight.dtype in (
            torch.float16,
            torch.bfloat16,
            torch.float32,
            torch.float64,
        )
        kind = dtype or (weight.dtype if floats and weight is not None else default)
        stack = next(iter(read_stacks(mixture.alignment, module)))
        members.append(_member(mixture, module, numbers[module.name], stack, target, kind, device))
    return members, targets


def find_targets(model: nn.Module, mixture: Mixture) -> dict[str, nn.Module]:
    """The model's modules that the experts adapt, by the experts' names for them.

    A body without its head, or a head around the body the experts were trained on, shifts all names
    by the body's prefix; that is followed.
    """
    names = mixture.modules
    table = dict(model.named_modules())
    prefix = getattr(model, "base_model_prefix", "")
    ways = [names]
    if prefix:
        ways.append([f"{prefix}.{name}" for name in names])
        if all(name.startswith(f"{prefix}.") for name in names):
            ways.append([name.removeprefix(f"{prefix}.") for name in names])
    found = max(ways, key=lambda way: sum(name in table for name in way))
    missing = [name for name, there in zip(names, found, strict=True) if there not in table]
    if missing:
        shown = [f"the model has no module {name}" for name in missing[:6]]
        if len(missing) > 6:
            shown.append(f"and {len(missing) - 6} more of {len(names)}")
        base = mixture.alignment.base_model
        raise AlignmentError(
            shown, f"load the experts' base model ({base or 'not named'})", what=_MISFIT
        )
    targets = {name: table[there] for name, there in zip(names, found, strict=True)}
    faults = [
        fault
        for module in mixture.alignment.modules
        if (fault := _misfit(module.first, targets[module.name]))
    ]
    if faults:
        raise AlignmentError(
            faults[:8], "load the base model the experts were trained on", what=_MISFIT
        )
    return targets


def siblings(name: str) -> list[str]:
    """Modules that are known to read the tensor that this one reads, and itself, by name."""
    parent, _, leaf = name.rpartition(".")
    family: tuple[str, ...] = next((f for f in _SIBLINGS if leaf in f), (leaf,))
    return [f"{parent}.{sibling}" if parent else sibling for sibling in family]


def group_members(members: Sequence[Member]) -> Iterator[list[Member]]:
    """Put modules together that are known to read one tensor, if their kind agrees."""
    waiting = {member.name: member for member in members}
    for member in members:
        if member.name not in waiting:
            continue
        part = []
        for sibling in siblings(member.name):
            other = waiting.get(sibling)
            if other is not None and _alike(other, member):
                part.append(other)
                del waiting[other.name]
        yield part


def _alike(a: Member, b: Member) -> bool:
    """Whether two modules could share a shrink."""
    if a is b:
        return True
    kinds = [(m.form, m.down.shape[1], m.down.dtype, m.down.device, m.rows is None) for m in (a, b)]
    return a.form == "linear" and kinds[0] == kinds[1]


def _member(
    mixture: Mixture,
    module: AlignedModule,
    number: int,
    stack: RankStack,
    target: nn.Module,
    dtype: torch.dtype,
    device: torch.device,
) -> Member:
    count, spec = mixture.num_experts, mixture.spec
    spectrum = None
    if spec.signal == "spectrum":
        stack, spectrum = svd_form(stack, module.specs)
    up = (stack.up * stack.scale.to(stack.up.dtype)).mT
    rows, bias = _gate_rows(mixture.gate, spec, module.name)
    return Member(
        name=module.name,
        number=number,
        form=module.first.form,
        down=stack.down.to(device, dtype),
        up=up.to(device, dtype),
        owner=tuple(stack.owner.tolist()),
        experts=tuple(index for index in module.specs if index < count),
        general=tuple(index for index in module.specs if index >= count),
        rows=None if rows is None else rows.to(device),
        bias=None if bias is None else bias.to(device),
        spectrum=None if spectrum is None else spectrum.to(device),
        kernel=module.first.kernel,
        how=_convolution(target) if module.first.form == "conv" else {},
        output_scale=_embedding_scale(target),
    )


def _gate_rows(
    gate: Mapping[str, Tensor], spec: GateSpec, module: str
) -> tuple[Tensor | None, Tensor | None]:
    rows = gate.get(f"{module}.prototype", gate.get(f"{module}.weight"))
    if rows is not None and spec.standardise:
        rows = standardised_rows(rows)
    return rows, gate.get(f"{module}.rank_bias")


def _misfit(spec: ModuleSpec, target: nn.Module) -> str | None:
    """What does not fit between an adapted module and the model's, in words."""
    if spec.form == "conv":
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
        have = (
            getattr(target, "out_features", getattr(target, "nf", spec.d_out)),
            getattr(target, "in_features", getattr(target, "nx", spec.d_in)),
        )
    if have != (spec.d_out, spec.d_in):
        return f"{spec.name}: experts {spec.d_out} x {spec.d_in}, the model {have[0]} x {have[1]}"
    return None


def _convolution(target: Any) -> dict[str, Any]:
    if isinstance(target.padding, str) and target.padding != "valid":
        raise MethodError(f"a convolution with padding={target.padding!r}", "leave it out")
    return {
        "stride": target.stride,
        "padding": 0 if isinstance(target.padding, str) else target.padding,
        "dilation": target.dilation,
    }


def _embedding_scale(target: nn.Module) -> float:
    """What a scaled embedding (Gemma) multiplies its rows by."""
    scale = getattr(target, "embed_scale", None) if isinstance(target, nn.Embedding) else None
    return 1.0 if scale is None else float(scale)


def _device_of(target: nn.Module, model: nn.Module) -> torch.device:
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


def stack_shapes(mixture: Mixture) -> list[StackShape]:
    """The different stacks that a mixture runs, as `kernels.gated_stack.tune` wants them.

    Embeddings and convolutions have no other implementation and are left out.
    """
    waiting = {m.name: m for m in mixture.alignment.modules if m.first.form == "linear"}
    shapes: dict[StackShape, None] = {}
    for name, module in list(waiting.items()):
        ranks = tuple(spec.rank for spec in module.specs.values())
        group = [waiting.pop(n) for n in siblings(name) if n in waiting]
        if group:
            shapes[StackShape(module.first.d_in, tuple(m.first.d_out for m in group), ranks)] = None
    return list(shapes)
