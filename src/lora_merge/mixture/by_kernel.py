"""A group's units from a kernel, where the dispatch table has one that is faster."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lora_merge.kernels.gated_stack import (
    Layout,
    Shrunk,
    dispatch,
    fused,
    gated_shrink,
    routed_shrink,
)
from lora_merge.kernels.gated_stack.concat import FEW_TOKENS, Joined
from lora_merge.kernels.gated_stack.joined import JoinedStack
from lora_merge.kernels.gated_stack.operation import chosen
from lora_merge.mixture.context import Context
from lora_merge.mixture.gate import GateSpec

if TYPE_CHECKING:
    from lora_merge.mixture.group import Group


def kernel_units(group: "Group", x: Tensor, start: int, stop: int) -> Sequence[Shrunk] | None:
    """Gated units of members start..stop.

    Args:
        group: The modules.
        x: Their input, shape (..., d_in).
        start: First member.
        stop: After the last.

    Returns:
        Of each member; or None where the plain operations are to run: for embeddings and
        convolutions, for members that are not alike, for gates that need the units themselves, and
        wherever nothing else is faster or asked for.
    """
    spec = group.context.spec
    if not _suits(group) or (stop - start > 1 and not group.uniform):
        return None
    if not group.has_kernel and dispatch.forced() != "reference":
        return None
    kind = _kind(group)
    down = group.down[group.units[start] : group.units[stop]]
    layout, how = _plan(group, x, down, start, stop, kind)
    if how not in ("triton", "reference"):
        return None
    if x.dtype != down.dtype:
        x = x.to(down.dtype)
    if kind == "given":
        weights = group.weights_of(x, start, stop)
        return gated_shrink(x, down, weights, layout, implementation=how)
    gate, bias = group.gate_of(start, stop)
    rule = spec.rule(len(gate) // (stop - start))
    return routed_shrink(x, down, gate, layout, rule, bias=bias, implementation=how)


@dataclass(frozen=True, eq=False)
class JoinedPlan:
    """What runs a joined group, and while what is so; to think of it anew costs a launch or two.

    Attributes:
        spec: The gate in force.
        seen: Whether somebody looks at the weights, or wants some of them alone.
        wanted: What the user asked for.
        stack: What runs it; None for the plain operations.
        given: Whether it wants weights.
    """

    spec: GateSpec
    seen: bool
    wanted: str
    stack: JoinedStack | None = None
    given: bool = False

    def holds(self, context: Context) -> bool:
        """Whether all that is still so."""
        seen = context.observe is not None or context.only is not None
        return self.spec is context.spec and self.seen == seen and self.wanted == dispatch.forced()


def plan_joined(group: "Group", x: Tensor, joined: Joined) -> JoinedPlan:
    """How to run all members on some tokens where the base weights stand beside the experts.

    Args:
        group: The modules.
        x: Their input, shape (..., d_in), T tokens.
        joined: Their matrix.
    """
    context, count, tokens = group.context, len(group.names), x.numel() // joined.d_in
    seen = context.observe is not None or context.only is not None
    plain = JoinedPlan(context.spec, seen, dispatch.forced())
    if not (group.has_kernel and joined.up is not None and _suits(group)):
        return plain
    layout = _layout(group, 0, count, context.spec.granularity == "rank")
    fits = joined.num_units and fused.holds(tokens, layout.num_weights + 1)
    if not (fits and 0 < tokens <= FEW_TOKENS and (group.uniform or count == 1)):
        return plain
    kind = _kind(group)
    case = dispatch.case_of(x, layout.outputs, joined.num_units, x.dtype, kind)
    if dispatch.choose(case, ["concat", "joined"]) != "joined":
        return plain
    if kind == "given" or not joined.scores:
        return replace(plain, stack=JoinedStack(joined, layout.columns), given=True)
    gate, bias = group.gate_of(0, count)
    rule = context.spec.rule(len(gate) // count)
    return replace(plain, stack=JoinedStack(joined, layout.columns, rule=rule, bias=bias))


def _suits(group: "Group") -> bool:
    """Whether the kernels know such modules and gates at all."""
    spectrum = group.context.spec.signal == "spectrum"
    return group.form == "linear" and not spectrum and group.rank_gates is None


def _kind(group: "Group") -> dispatch.GateKind:
    """What the dispatch table calls the group's gate."""
    if not _makes_own_weights(group):
        return "given"
    return "dense" if group.context.spec.top_k is None else "top-k"


def _makes_own_weights(group: "Group") -> bool:
    """Whether a token's weights are a function of its own scores and nobody wants to see them."""
    context, spec = group.context, group.context.spec
    return (
        spec.has_rows
        and not (spec.standardise or spec.sequence or spec.memory or group.num_general)
        and context.observe is None
        and context.only is None
    )


def _plan(
    group: "Group", x: Tensor, down: Tensor, start: int, stop: int, kind: dispatch.GateKind
) -> tuple[Layout, str]:
    """Layout and implementation, remembered: to ask the table anew costs as much as a launch."""
    by_rank = group.context.spec.granularity == "rank"
    if torch.compiler.is_compiling():
        layout = _layout(group, start, stop, by_rank)
        return layout, chosen(x, down, layout, kind)
    key = (start, stop, by_rank, kind, x.numel(), dispatch.forced())
    if key not in group.plans:
        layout = _layout(group, start, stop, by_rank)
        group.plans[key] = layout, chosen(x, down, layout, kind)
    return group.plans[key]


def _layout(group: "Group", start: int, stop: int, by_rank: bool) -> Layout:
    """The units of members that are alike (or one)."""
    columns = group.columns_of(start)
    outputs = sum(up.shape[1] for up in group.factors()[0][start:stop])
    if by_rank:
        units = torch.arange(len(columns), device=columns.device)
        return Layout(units, len(units), 1, stop - start, outputs)
    return Layout(columns, group.widths[start], group.block, stop - start, outputs)
