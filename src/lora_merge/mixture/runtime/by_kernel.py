"""A group's units from a kernel, where the dispatch table has one that is faster."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lora_merge.kernels.gated_stack import dispatch
from lora_merge.kernels.gated_stack.base_matrix import FEW_TOKENS, Joined
from lora_merge.kernels.gated_stack.gpu import fused
from lora_merge.kernels.gated_stack.gpu.base_matrix_launch import JoinedStack
from lora_merge.kernels.gated_stack.layout import Layout, Shrunk
from lora_merge.kernels.gated_stack.operation import chosen, gated_shrink, routed_shrink
from lora_merge.mixture.gates.gate import GateSpec
from lora_merge.mixture.runtime.context import Context

if TYPE_CHECKING:
    from lora_merge.mixture.runtime.group import Group


@dataclass(frozen=True, eq=False)
class Plan:
    """What runs a group, and while what is so; to think of it anew costs as much as a launch.

    Attributes:
        spec: The gate in force.
        seen: Whether somebody looks at the weights, or wants some of them alone.
        wanted: What the user asked for.
        how: The implementation.
        layout: Units and weights; None if none of the kernels knows such modules and gates.
        given: Whether weights are made outside the kernel.
        stack: What runs a joined group.
    """

    spec: GateSpec
    seen: bool
    wanted: str
    how: str = "eager"
    layout: Layout | None = None
    given: bool = False
    stack: JoinedStack | None = None

    def holds(self, context: Context) -> bool:
        """Whether all that is still so."""
        return (
            self.spec is context.spec
            and self.seen == _is_seen(context)
            and self.wanted == dispatch.forced()
        )


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
    if not group.has_kernel and dispatch.forced() != "reference":
        return None
    down = group.down[group.units[start] : group.units[stop]]
    if torch.compiler.is_compiling():
        plan = _plan(group, x, down, start, stop)
    else:
        tokens = x.numel() // max(1, x.shape[-1])
        key = start, stop, (tokens - 1).bit_length(), x.dtype  # one for each row of the table
        found = group.plans.get(key)
        if found is None or not found.holds(group.context):
            found = group.plans[key] = _plan(group, x, down, start, stop)
        plan = found
    layout, how = plan.layout, plan.how
    if layout is None or how not in ("triton", "grouped", "reference"):
        return None
    if x.dtype != down.dtype:
        x = x.to(down.dtype)
    if plan.given:
        weights = group.weights_of(x, start, stop)
        return gated_shrink(x, down, weights, layout, implementation=how)
    gate, bias = group.gate_of(start, stop)
    rule = group.context.spec.rule(len(gate) // (stop - start))
    return routed_shrink(x, down, gate, layout, rule, bias=bias, implementation=how)


def _plan(group: "Group", x: Tensor, down: Tensor, start: int, stop: int) -> Plan:
    """How to run members start..stop."""
    context = group.context
    plan = Plan(context.spec, _is_seen(context), dispatch.forced())
    if not _suits(group) or (stop - start > 1 and not group.uniform):
        return plan
    plans = group.plans.items()  # of other token counts, whose layouts know where units stand
    known = (p.layout for k, p in plans if k[:2] == (start, stop) and p.spec is context.spec)
    layout, kind = next(known, None) or _layout(group, start, stop), _kind(group)
    how = chosen(x, down, layout, kind)
    return replace(plan, how=how, layout=layout, given=kind == "given")


def plan_joined(group: "Group", x: Tensor, joined: Joined) -> Plan:
    """How to run all members on some tokens where the base weights stand beside the experts.

    Args:
        group: The modules.
        x: Their input, shape (..., d_in), T tokens.
        joined: Their matrix.
    """
    context, count, tokens = group.context, len(group.names), x.numel() // joined.d_in
    plan = Plan(context.spec, _is_seen(context), dispatch.forced())
    if not (group.has_kernel and joined.up is not None and _suits(group)):
        return plan
    layout = _layout(group, 0, count)
    fits = joined.num_units and fused.holds(tokens, layout.num_weights + 1)
    if not (fits and 0 < tokens <= FEW_TOKENS and (group.uniform or count == 1)):
        return plan
    kind = _kind(group)
    case = dispatch.case_of(x, layout.outputs, joined.num_units, x.dtype, kind)
    if dispatch.choose(case, ["concat", "joined"]) != "joined":
        return plan
    plan = replace(plan, how="joined", layout=layout)
    if kind == "given" or not joined.scores:
        return replace(plan, given=True, stack=JoinedStack(joined, layout.columns))
    gate, bias = group.gate_of(0, count)
    rule = context.spec.rule(len(gate) // count)
    stack = JoinedStack(joined, layout.columns, scores=len(gate), rule=rule, bias=bias)
    return replace(plan, stack=stack)


def _is_seen(context: Context) -> bool:
    """Whether somebody looks at the weights, or wants some of them alone."""
    return context.observe is not None or context.only is not None


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
    spec = group.context.spec
    apart = spec.standardise or spec.sequence or spec.memory or group.num_general
    return spec.has_rows and not apart and not _is_seen(group.context)


def _layout(group: "Group", start: int, stop: int) -> Layout:
    """The units of members that are alike (or one)."""
    columns = group.columns_of(start)
    outputs = sum(up.shape[1] for up in group.factors()[0][start:stop])
    if group.context.spec.granularity == "rank":
        units = torch.arange(len(columns), device=columns.device)
        return Layout(units, len(units), 1, stop - start, outputs)
    return Layout(columns, group.widths[start], group.block, stop - start, outputs)
