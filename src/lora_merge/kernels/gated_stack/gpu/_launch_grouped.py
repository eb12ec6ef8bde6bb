"""Launches of the kernels that group tokens by expert. Imported only when chosen."""

import torch
from torch import Tensor

from lora_merge.kernels.gate_rule import Rule
from lora_merge.kernels.gated_stack.gpu._launch import (
    _arithmetic,
    _cdiv,
    _numbers,
    _on,
    _power,
    _rule,
)
from lora_merge.kernels.gated_stack.gpu.jit import _triton_grouped
from lora_merge.kernels.gated_stack.layout import Layout, Places

BLOCK = 32  # tokens of a block
_OFTEN = 4  # tiles of columns that a program of the expand writes one after the other
_CACHE = 24 << 20  # bytes of output that are still in a GPU's cache when the next slot reads them


def route(
    parts: Tensor, layout: Layout, rule: Rule, bias: Tensor | None, tile: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores to experts and weights.

    Args:
        parts: Pieces of the scores, shape (split, T, M n).
        layout: Members and their experts.
        rule: How scores become weights; k are kept.
        bias: For the selection alone, shape (M n,).
        tile: Tokens of a tile.

    Returns:
        Expert of each slot of each token, int32, shape (M, k, T); its weight, float32, likewise;
        how many tokens of each tile take each expert, int32, shape (M, k, tiles, C).
    """
    split, tokens, _ = parts.shape
    members, count, kept = layout.members, layout.num_weights, rule.top_k or 0
    scores = count + rule.null_row
    tiles = _cdiv(tokens, tile)
    experts = torch.empty(members, kept, tokens, dtype=torch.int32, device=parts.device)
    weights = torch.empty(members, kept, tokens, dtype=torch.float32, device=parts.device)
    counts = torch.empty(members, kept, tiles, count, dtype=torch.int32, device=parts.device)
    with _on(parts.device):
        _triton_grouped.route_kernel[(tiles, members)](
            parts, parts if bias is None else bias, experts, weights, counts,
            tokens, parts.stride(1), scores, count, *_numbers(rule),
            SPLIT=split, BIAS=bias is not None, BT=tile, **_rule(rule, scores), num_warps=4,
            enable_fp_fusion=False,
        )  # fmt: skip
    return experts, weights, counts


def place(experts: Tensor, counts: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    """Tokens in order of their expert, in blocks; see `Places`.

    Args:
        experts: Shape (M, k, T).
        counts: Shape (M, k, tiles, C).
        tile: Tokens of a tile.

    Returns:
        The order, shape (M, k, B, BLOCK), and the blocks, shape (M, k, B, 2).
    """
    members, kept, tokens = experts.shape
    tiles, count = counts.shape[2:]
    # No group of tokens of one expert, or of none, leaves more than one block unfilled.
    num_blocks = tokens // BLOCK + min(tokens, count + 1)
    shape = members, kept, num_blocks
    order = torch.empty(*shape, BLOCK, dtype=torch.int32, device=experts.device)
    blocks = torch.empty(*shape, 2, dtype=torch.int32, device=experts.device)
    with _on(experts.device):
        _triton_grouped.place_kernel[(tiles, members * kept)](
            experts, counts, order, blocks, tokens, num_blocks, count,
            TOP_K=kept, BM=BLOCK, BT=tile, BS=_power(count),
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return order, blocks


def shrink(
    x: Tensor,
    down: Tensor,
    weights: Tensor,
    segments: Tensor,
    order: Tensor,
    blocks: Tensor,
    widest: int,
) -> Tensor:
    """Gated units of every block.

    Args:
        x: Shape (T, d_in), last dimension contiguous.
        down: Shape (M R, d_in), contiguous.
        weights: Shape (M, k, T).
        segments: First unit and number of units of each expert, shape (C, 2).
        order: Shape (M, k, B, BLOCK).
        blocks: Shape (M, k, B, 2).
        widest: The largest number of units.

    Returns:
        Shape (M, k, B, BLOCK, a power of two not below `widest`), in the dtype of `x`.
    """
    members, kept, num_blocks, _ = order.shape
    tokens, width = x.shape
    rank = max(16, _power(widest))
    z = torch.empty(*order.shape, rank, dtype=x.dtype, device=x.device)
    with _on(x.device):
        _triton_grouped.shrink_kernel[(num_blocks, members * kept)](
            x, down, weights, segments, order, blocks, z, tokens, num_blocks, x.stride(0),
            down.shape[0] // members, len(segments), width, TOP_K=kept, BM=BLOCK, BR=rank,
            BK=128 if x.element_size() == 2 else 64, **_arithmetic(x.dtype), num_warps=4,
            num_stages=4 if rank <= 32 else 3, enable_fp_fusion=False,
        )  # fmt: skip
    return z


def expand(y: Tensor, z: Tensor, up: Tensor, places: Places) -> Tensor:
    """Add the units' outputs to the base module's, slot after slot.

    Args:
        y: Shape (T, d_out), last dimension contiguous.
        z: Shape (k, B, BLOCK, rank).
        up: Shape (R, d_out), contiguous.
        places: Of the units.

    Returns:
        Shape (T, d_out), contiguous, in the dtype of `y`.
    """
    tokens, width = y.shape
    kept, num_blocks, _, rank = z.shape
    out = torch.empty(tokens, width, dtype=y.dtype, device=y.device)
    columns = _columns(rank * z.element_size()) // (z.element_size() // 2)
    often = min(_OFTEN, _cdiv(width, columns))
    step = columns * often
    most = _CACHE // (tokens * out.element_size()) // step if kept > 1 else width
    bands = _cdiv(_cdiv(width, step), max(1, most))
    band = _cdiv(_cdiv(width, step), bands) * step
    slots = list(zip(z, places.weights, places.order, places.blocks, strict=True))
    constants = _arithmetic(z.dtype) | {"BM": BLOCK, "BR": rank, "BN": columns, "TILES": often}
    constants |= {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": False}
    launch = _triton_grouped.expand_kernel[(num_blocks, _cdiv(band, step))]
    with _on(y.device):
        for start in range(0, width, band):
            for slot, (units, weights, order, blocks) in enumerate(slots):
                base = out if slot else y
                launch(
                    base, units, up, weights, places.segments, order, blocks, out,
                    start, base.stride(0), len(places.segments), width, **constants,
                )  # fmt: skip
    return out


def _columns(row: int) -> int:
    """Columns of a tile, for rows of `row` bytes of z: fewer of long ones fit into registers."""
    return 128 if row <= 64 else 64 if row <= 256 else 32


def tile_of(layout: Layout, rule: Rule) -> int:
    """Tokens of a program that looks at all experts of each."""
    scores: int = _rule(rule, layout.num_weights + rule.null_row)["BS"]
    return min(32, 2048 // scores)
