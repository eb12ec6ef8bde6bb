"""A group's units from a kernel, where the dispatch table has one that is faster."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lora_merge.kernels.gated_stack import Layout, Units, dispatch, gated_shrink, routed_shrink
from lora_merge.kernels.gated_stack.operation import chosen

if TYPE_CHECKING:
    from lora_merge.mixture.group import Group


def kernel_units(group: "Group", x: Tensor, start: int, stop: int) -> Sequence[Units] | None:
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
    if group.form != "linear" or spec.signal == "spectrum" or group.rank_gates is not None:
        return None
    if not group.has_kernel and dispatch.forced() != "reference":
        return None
    if stop - start > 1 and not group.uniform:
        return None
    routed = _makes_own_weights(group)
    kind: dispatch.GateKind = "given"
    if routed:
        kind = "dense" if spec.top_k is None else "top-k"
    down = group.down[group.units[start] : group.units[stop]]
    layout, how = _plan(group, x, down, start, stop, kind)
    if how not in ("triton", "reference"):
        return None
    if x.dtype != down.dtype:
        x = x.to(down.dtype)
    if not routed:
        weights = group.weights_of(x, start, stop)
        return gated_shrink(x, down, weights, layout, implementation=how)
    gate, bias = group.gate_of(start, stop)
    rule = spec.rule(len(gate) // (stop - start))
    return routed_shrink(x, down, gate, layout, rule, bias=bias, implementation=how)


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
