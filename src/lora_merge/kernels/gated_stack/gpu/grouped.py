"""The gated stack with tokens grouped by expert: which launches make up each step."""

import torch
from torch import Tensor

from lora_merge.kernels.gate_rule import Rule
from lora_merge.kernels.gated_stack.gpu.fused import _rows
from lora_merge.kernels.gated_stack.layout import Layout, Places, Units

_MOST_EXPERTS, _MOST_KEPT, _WIDEST = 256, 16, 128


def fits(layout: Layout, rule: Rule) -> bool:
    """Whether tokens can be grouped: few of not too many experts, each with its units in a row."""
    size = layout.num_weights + (rule.null_row or rule.null_score is not None)
    if rule.top_k is None or rule.top_k >= min(size, _MOST_KEPT + 1) or size > _MOST_EXPERTS:
        return False
    return layout.segments is not None and layout.segments[1] <= _WIDEST


def routed_shrink(
    x: Tensor, down: Tensor, gate: Tensor, bias: Tensor | None, layout: Layout, rule: Rule
) -> list[Units]:
    """Route tokens to the experts they keep, and shrink them by those alone.

    Args:
        x: Shape (T, d_in).
        down: Shape (M R, d_in).
        gate: Rows whose products with a token are its scores, shape (M n, d_in).
        bias: Shape (M n,), or None.
        layout: Units and weights; they must fit.
        rule: How scores become weights; it must fit.

    Returns:
        Grouped units of each member.
    """
    from lora_merge.kernels.gated_stack.gpu import _launch
    from lora_merge.kernels.gated_stack.gpu import _launch_grouped as launch

    assert layout.segments is not None
    (segments, widest), units = layout.segments, layout.num_units
    x = _rows(x)
    parts = _launch.score(x, gate.contiguous())
    bias = None if bias is None else bias.contiguous()
    tile = launch.tile_of(layout, rule)
    experts, weights, counts = launch.route(parts, layout, rule, bias, tile)
    order, blocks = launch.place(experts, counts, tile)
    z = launch.shrink(x, down.contiguous(), weights, segments, order, blocks, widest)
    return [
        Units(z[m], None, "grouped", Places(order[m], blocks[m], weights[m], segments, units))
        for m in range(layout.members)
    ]


def expand(y: Tensor, z: Tensor, up: Tensor, places: Places) -> Tensor:
    """Y + z up, into new memory.

    Between the k slots the result is rounded to the dtype of `y`.

    Args:
        y: Shape (T, d_out).
        z: Grouped units.
        up: Shape (R, d_out).
        places: Of the units.

    Returns:
        Shape (T, d_out).
    """
    from lora_merge.kernels.gated_stack.gpu import _launch_grouped as launch

    return launch.expand(_rows(y), z, up.contiguous(), places)


def ungrouped(z: Tensor, places: Places) -> Tensor:
    """Grouped units as other implementations know them, shape (T, R)."""
    tokens = places.weights.shape[1]
    expert, count = places.blocks.unbind(-1)
    first, length = places.segments[expert.clamp(0, len(places.segments) - 1)].unbind(-1)
    i = torch.arange(z.shape[2], device=z.device)[:, None]
    r = torch.arange(z.shape[3], device=z.device)
    taken = (expert >= 0) & (expert < len(places.segments))
    used = taken[..., None, None] & (i < count[..., None, None]) & (r < length[..., None, None])
    token = places.order[..., None].expand_as(used)[used]
    unit = (first[..., None, None] + r).expand_as(used)[used]
    out = z.new_zeros(tokens, places.num_units)
    out[token, unit] = z[used]
    return out.masked_fill_(places.weights.isnan().all(0)[:, None], torch.nan)
