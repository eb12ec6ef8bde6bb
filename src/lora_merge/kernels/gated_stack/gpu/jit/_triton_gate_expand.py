"""Gate and expand of few tokens as one Triton kernel, for all modules that share the input.

Decoding is a matter of launches and of loads in flight, not of arithmetic: every program makes the
weights anew, which costs less than one more launch, and asks for its piece of `up` at once.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from lora_merge.kernels.gated_stack.gpu.jit._triton_gate import gate_facts, sum_of_pieces, weight_at


@triton.jit
def _rows_of_up(up_columns, r, width, live, in_n):
    """Some rows of `up`, shape (BR, BN)."""
    at = up_columns + r[:, None].to(tl.int64) * width
    return tl.load(at, mask=live[:, None] & in_n, other=0.0)


@triton.jit(do_not_specialize=["tokens", "share"])
def gate_expand_kernel(
    y,
    parts,
    score_parts,
    columns,
    bias,
    up,
    out,
    tokens,
    share,
    stride_y,
    stride_parts,
    stride_scores,
    part_step,
    score_step,
    units,
    scores,
    temperature,
    factor,
    null_score,
    widths,
    MEMBERS: tl.constexpr,
    SPLIT: tl.constexpr,
    SCORE_SPLIT: tl.constexpr,
    KIND: tl.constexpr,
    TOP_K: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    NULL: tl.constexpr,
    BIAS: tl.constexpr,
    SKIP: tl.constexpr,
    SPARSE: tl.constexpr,
    EARLY: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
    BS: tl.constexpr,
    ONE_CHUNK: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out_m[t] = y_m[t] + sum over units r of g_r u_r up_m[r], members m one after another.

    `y` holds the members' outputs side by side, `up` and `out` one matrix after another. With SKIP
    a row of `up` that no token uses is not fetched; without, it is asked for before its weight is
    known, and with EARLY before the kernel that makes `y` and the parts has ended.
    """
    tile = tl.program_id(0)
    m = 0
    start = tl.full((), 0, tl.int64)  # the member's first column among all outputs
    width = widths[0]
    for i in tl.static_range(1, MEMBERS):
        before = tl.cdiv(widths[i - 1], BN)
        if (m == i - 1) & (tile >= before):
            tile -= before
            start += widths[i - 1]
            width = widths[i]
            m = i
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    n = tile * BN + tl.arange(0, BN)
    here = (t < tokens)[:, None]
    in_n = (n < width)[None, :]
    up_columns = up + start * units + n[None, :]
    lane = tl.arange(0, BR)
    if not SKIP:
        b = _rows_of_up(up_columns, lane, width, lane < units, in_n)
        if not EARLY:
            tl.debug_barrier()  # or the compiler moves the loads behind the gate
    if EARLY:
        gdc_wait()
    unit_row = parts + (t * stride_parts)[:, None] + m * units
    score_row = score_parts + (t // share * stride_scores)[:, None] + m * scores
    facts = gate_facts(
        score_row, score_step, bias + m * scores, here, scores, temperature, null_score,
        SCORE_SPLIT, KIND, TOP_K, ABSOLUTE, NULL, BIAS, BT, BS,
    )  # fmt: skip
    acc = tl.zeros((BT, BN), dtype=tl.float32)
    for first in range(0, BR if ONE_CHUNK else units, BR):
        r = (first + lane)[None, :]
        inside = here & (r < units)
        u = sum_of_pieces(unit_row, part_step, r, inside, SPLIT)
        column = tl.load(columns + r, mask=r < units, other=0).to(tl.int32)
        own = weight_at(
            sum_of_pieces(score_row, score_step, column, inside, SCORE_SPLIT), column,
            bias + m * scores, inside, temperature, factor, facts, KIND, TOP_K, ABSOLUTE, BIAS,
        )  # fmt: skip
        z = tl.where(inside, u * own, 0.0).to(up.dtype.element_ty)
        if SPARSE:
            live = tl.max(tl.where(z != 0.0, 1, 0), 0) > 0
            if SKIP:
                b = _rows_of_up(up_columns, first + lane, width, live, in_n)
            else:
                b = tl.where(live[:, None], b, 0.0)
        if BT == 1:
            each = tl.sum(z.to(tl.float32), 0)[:, None] * b.to(tl.float32)
            acc += tl.sum(each, 0)[None, :]
        elif UPCAST:
            acc = tl.dot(z.to(tl.float32), b.to(tl.float32), acc, input_precision=PRECISION)
        else:
            acc = tl.dot(z, b, acc, input_precision=PRECISION)
        if not SKIP and not ONE_CHUNK:
            ahead = first + BR + lane
            b = _rows_of_up(up_columns, ahead, width, ahead < units, in_n)
    mine = here & in_n
    base = tl.load(y + (t * stride_y)[:, None] + start + n[None, :], mask=mine, other=0.0)
    at = out + (start * tokens + t * width)[:, None] + n[None, :]
    tl.store(at, acc + base.to(tl.float32), mask=mine)
