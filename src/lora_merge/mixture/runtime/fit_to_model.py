"""From a mixture on disk to members that can run in a given model."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_merge.adapters.aligned_module import AlignedModule
from lora_merge.adapters.alignment import read_stacks
from lora_merge.adapters.rank_stack import RankStack
from lora_merge.errors import MethodError
from lora_merge.kernels.gated_stack.tune_cases import StackShape
from lora_merge.mixture.gates.gate import GateSpec
from lora_merge.mixture.gates.initial import svd_form
from lora_merge.mixture.gates.layer_norm import standardised_rows
from lora_merge.mixture.mixture import Mixture
from lora_merge.mixture.runtime.targets import device_of, find_targets
from lora_merge.mixture.runtime.wrapped.member import Member

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
    model: nn.Module,
    mixture: Mixture,
    dtype: torch.dtype | None,
    only: Mapping[str, Collection[int]] | None = None,
) -> tuple[list[Member], dict[str, nn.Module]]:
    """Read every module's stack and fit it to the model's module.

    Args:
        model: The model.
        mixture: The mixture.
        dtype: Of the experts; default: that of each target module.
        only: Of these modules read no other experts than these.

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
        wanted = module.specs if only is None else only.get(module.name, module.specs)
        part = module.restricted(wanted)
        if not part.specs:
            continue
        target = targets[module.name]
        weight = next(target.parameters(recurse=False), None)
        device = device_of(target, model)
        floats = weight is not None and weight.dtype in (
            torch.float16,
            torch.bfloat16,
            torch.float32,
            torch.float64,
        )
        kind = dtype or (weight.dtype if floats and weight is not None else default)
        stack = next(iter(read_stacks(mixture.alignment, part)))
        member = _member(mixture, part, numbers[module.name], stack, target, kind, device)
        if member.rows is not None and len(part.specs) < len(module.specs):
            present = [i for i in module.specs if i < mixture.num_experts]
            member = replace(member, rows=member.rows[[present.index(e) for e in member.experts]])
        members.append(member)
    return members, targets


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
    return a.form == "linear" and kinds[0] == kinds[1] and a.is_cross == b.is_cross


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
