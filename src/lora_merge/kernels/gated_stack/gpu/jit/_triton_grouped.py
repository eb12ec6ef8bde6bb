"""Many tokens, few experts each: tokens are grouped by expert, and each group is one small product.

    route    scores to the kept experts and their weights, and how many tokens of a tile take each
    place    tokens in order of their expert, in blocks of BM tokens of one expert
    shrink   z = g down_e x for the tokens of a block
    expand   y + z up_e for the tokens of a block, one slot after the other

A token has one expert in each of its slots (the kept experts in order of their number), so within a
slot no two blocks write one row. The tokens of one member and slot are a queue. A prefix over the
tiles' counts places the tokens: no atomics, no sorting, no word from the device to the host, and no
shape that depends on data; there are as many blocks as there could be at most, and those that are
not needed end at once. What becomes of a token does not depend on the tokens beside it.
"""

import triton
import triton.language as tl

from lora_merge.kernels.gated_stack.gpu.jit._triton_gate import gate_facts, sum_of_pieces, weight_at


@triton.jit(do_not_specialize=["tokens"])
def route_kernel(
    parts,
    bias,
    experts,
    weights,
    counts,
    tokens,
    stride_parts,
    scores,
    num_experts,
    temperature,
    factor,
    null_score,
    SPLIT: tl.constexpr,
    KIND: tl.constexpr,
    TOP_K: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    NULL: tl.constexpr,
    BIAS: tl.constexpr,
    BT: tl.constexpr,
    BS: tl.constexpr,
):
    """Expert and weight of each slot of some tokens of one member, and how many take each expert.

    An empty slot (the null expert's, or that of a weight that is zero) has expert `num_experts` and
    weight 0. A token with a score that is not a number has empty slots alone, of weight NaN.
    """
    tile = tl.program_id(0).to(tl.int64)
    tiles = tl.num_programs(0)
    m = tl.program_id(1)
    t = tile * BT + tl.arange(0, BT)
    here = t < tokens
    row, step = parts + (t * stride_parts)[:, None] + m * scores, stride_parts * tokens.to(tl.int64)
    e = tl.arange(0, BS)[None, :]
    facts = gate_facts(
        row, step, bias + m * scores, here[:, None], scores, temperature, null_score,
        SPLIT, KIND, TOP_K, ABSOLUTE, NULL, BIAS, BT, BS,
    )  # fmt: skip
    inside = here[:, None] & (e < scores)
    g = weight_at(
        sum_of_pieces(row, step, e, inside, SPLIT), e, bias + m * scores, inside, temperature,
        factor, facts, KIND, TOP_K, ABSOLUTE, BIAS,
    )  # fmt: skip
    known = (e < num_experts) & (g == g)
    poisoned = tl.max(tl.where(known, 1, 0), 1) == 0
    left = here[:, None] & (e < num_experts) & (g != 0.0) & (poisoned == 0)[:, None]
    for slot in tl.static_range(TOP_K):
        first = tl.min(tl.where(left, e, BS), 1)
        mine = left & (e == first[:, None])
        left = left & (mine == 0)
        weight = tl.where(poisoned, float("nan"), tl.sum(tl.where(mine, g, 0.0), 1))
        queue = (m * TOP_K + slot).to(tl.int64)
        tl.store(experts + queue * tokens + t, tl.minimum(first, num_experts), mask=here)
        tl.store(weights + queue * tokens + t, weight, mask=here)
        at = counts + (queue * tiles + tile) * num_experts + e
        tl.store(at, tl.sum(tl.where(mine, 1, 0), 0)[None, :], mask=e < num_experts)


@triton.jit(do_not_specialize=["tokens", "num_blocks"])
def place_kernel(
    experts,
    counts,
    order,
    blocks,
    tokens,
    num_blocks,
    num_experts,
    TOP_K: tl.constexpr,
    BM: tl.constexpr,
    BT: tl.constexpr,
    BS: tl.constexpr,
):
    """Places of a tile's tokens, in order of expert and then as they stand, and some of the blocks.

    Blocks hold tokens of one expert; those of empty slots come last, and in slot 0 alone, where
    they too have a row to be written. blocks[b] is the expert (-1: nobody) and how many tokens.
    """
    tile = tl.program_id(0)
    tiles = tl.num_programs(0)
    queue = tl.program_id(1).to(tl.int64)
    is_first = queue % TOP_K == 0
    e = tl.arange(0, BS)
    total = tl.zeros((BS,), tl.int32)
    before = tl.zeros((BS,), tl.int32)
    for start in range(0, tiles, 32):
        i = start + tl.arange(0, 32)
        at = counts + (queue * tiles + i[:, None]) * num_experts + e[None, :]
        inside = (i < tiles)[:, None] & (e < num_experts)[None, :]
        count = tl.load(at, mask=inside, other=0)
        total += tl.sum(count, 0)
        before += tl.sum(tl.where((i < tile)[:, None], count, 0), 0)
    need = (total + BM - 1) // BM
    end = tl.cumsum(need, 0)
    begin = end - need
    num_used = tl.sum(need, 0)

    i = tl.arange(0, BT)
    t = tile * BT + i
    here = t < tokens
    own = tl.load(experts + queue * tokens + t, mask=here, other=-1)
    mine = (own[:, None] == e[None, :]) & (e < num_experts)[None, :]
    rank = tl.cumsum(tl.where(mine, 1, 0), 0) - 1
    place = tl.sum(tl.where(mine, (begin * BM + before)[None, :] + rank, 0), 1)
    empty = own == num_experts
    behind = num_used * BM + tile * BT - tl.sum(before, 0)
    place = tl.where(empty, behind + tl.cumsum(tl.where(empty, 1, 0), 0) - 1, place)
    row = order + queue * num_blocks * BM
    tl.store(row + place, t, mask=here & (own < num_experts + tl.where(is_first, 1, 0)))

    num_empty = tl.where(is_first, tokens - tl.sum(total, 0), 0)
    for start in range(tile * 32, num_blocks, tiles * 32):
        b = start + tl.arange(0, 32)
        passed = (e < num_experts)[None, :] & (b[:, None] >= end[None, :])
        expert = tl.sum(tl.where(passed, 1, 0), 1)
        within = tl.where(e[None, :] == expert[:, None], (total + begin * BM)[None, :], 0)
        left = tl.sum(within, 1) - b * BM
        left = tl.where(expert == num_experts, num_empty - (b - num_used) * BM, left)
        expert = tl.where(left > 0, expert, -1)
        at = blocks + (queue * num_blocks + b) * 2
        tl.store(at, expert, mask=b < num_blocks)
        tl.store(at + 1, tl.maximum(0, tl.minimum(left, BM)), mask=b < num_blocks)


@triton.jit(do_not_specialize=["tokens", "num_blocks"])
def shrink_kernel(
    x,
    down,
    weights,
    segments,
    order,
    blocks,
    z,
    tokens,
    num_blocks,
    stride_x,
    units,
    num_experts,
    width,
    TOP_K: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """z[queue, block, i] = weight times down x, of token i of the block and of its expert."""
    b = tl.program_id(0)
    queue = tl.program_id(1).to(tl.int64)
    block = queue * num_blocks + b
    expert = tl.load(blocks + block * 2)
    if expert < 0 or expert == num_experts:
        return
    i = tl.arange(0, BM)
    r = tl.arange(0, BR)
    here = i < tl.load(blocks + block * 2 + 1)
    t = tl.load(order + block * BM + i, mask=here, other=0)
    first = tl.load(segments + expert * 2)
    in_r = r < tl.load(segments + expert * 2 + 1)
    unit = (queue // TOP_K) * units + first + r
    x_rows = x + t[:, None].to(tl.int64) * stride_x
    down_rows = down + unit[:, None] * width
    acc = tl.zeros((BM, BR), dtype=tl.float32)
    for start in range(0, width, BK):
        k = start + tl.arange(0, BK)
        in_k = (k < width)[None, :]
        a = tl.load(x_rows + k[None, :], mask=here[:, None] & in_k, other=0.0)
        w = tl.load(down_rows + k[None, :], mask=in_r[:, None] & in_k, other=0.0)
        if UPCAST:
            a = a.to(tl.float32)
            w = w.to(tl.float32)
        acc = tl.dot(a, tl.trans(w), acc, input_precision=PRECISION)
    g = tl.load(weights + queue * tokens + t, mask=here, other=0.0)
    at = z + (block * BM + i[:, None]) * BR + r[None, :]
    tl.store(at, acc * g[:, None], mask=here[:, None])


# Where a slot's weights and blocks begin depends on T, and no T should compile anew.
@triton.jit(do_not_specialize_on_alignment=["weights", "blocks"])
def expand_kernel(
    y,
    z,
    up,
    weights,
    segments,
    order,
    blocks,
    out,
    start,
    stride_y,
    num_experts,
    width,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BN: tl.constexpr,
    TILES: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[t] = y[t] + z[t] up, for the tokens of a block and its expert, from column `start` on."""
    b = tl.program_id(0).to(tl.int64)
    expert = tl.load(blocks + b * 2)
    if expert < 0:
        return
    i = tl.arange(0, BM)
    r = tl.arange(0, BR)
    here = i < tl.load(blocks + b * 2 + 1)
    t = tl.load(order + b * BM + i, mask=here, other=0)
    some = expert < num_experts
    first = tl.load(segments + expert * 2, mask=some, other=0)
    in_r = r < tl.load(segments + expert * 2 + 1, mask=some, other=0)
    unit = here[:, None] & in_r[None, :]
    a = tl.load(z + (b * BM + i[:, None]) * BR + r[None, :], mask=unit, other=0.0)
    g = tl.load(weights + t, mask=here, other=0.0)
    flaw = tl.where(some, 0.0, g * 0.0)[:, None]  # NaN for a token whose scores are not numbers
    y_rows = y + t[:, None].to(tl.int64) * stride_y
    out_rows = out + t[:, None].to(tl.int64) * width
    up_rows = up + (first + r)[:, None].to(tl.int64) * width
    for tile in tl.range(TILES, num_stages=3):  # said here, rows of y are fetched ahead too
        n = start + (tl.program_id(1) * TILES + tile) * BN + tl.arange(0, BN)
        in_n = (n < width)[None, :]
        inside = here[:, None] & in_n
        base = tl.load(y_rows + n[None, :], mask=inside, other=0.0, eviction_policy="evict_first")
        w = tl.load(up_rows + n[None, :], mask=in_r[:, None] & in_n, other=0.0)
        total = base.to(tl.float32) + flaw
        if UPCAST:
            total = tl.dot(a.to(tl.float32), w.to(tl.float32), total, input_precision=PRECISION)
        else:
            total = tl.dot(a, w, total, input_precision=PRECISION)
        tl.store(out_rows + n[None, :], total, mask=inside)
