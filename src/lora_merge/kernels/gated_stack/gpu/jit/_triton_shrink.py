"""Tokens against `down` and the gate's rows as Triton kernels."""

import triton
import triton.language as tl


@triton.jit
def _products(
    x,
    rows,
    out,
    tile,
    tokens,
    stride_x,
    num_rows,
    width,
    stride_out,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[piece, t, n] = sum over a piece of the width of x[t, k] rows[n, k], for one tile.

    One token is multiplied entry by entry: a tensor core would want sixteen, and its operands to
    pass through shared memory.
    """
    piece = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    n = tile.to(tl.int64) * BN + tl.arange(0, BN)
    x_rows = x + t[:, None] * stride_x
    other_rows = rows + n[:, None] * width
    in_t = (t < tokens)[:, None]
    in_n = n < num_rows
    steps = tl.cdiv(tl.cdiv(width, BK), SPLIT)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    each = tl.zeros((BN, BK), dtype=tl.float32)
    for step in range(steps):
        k = (piece * steps + step) * BK + tl.arange(0, BK)
        in_k = (k < width)[None, :]
        a = tl.load(x_rows + k[None, :], mask=in_t & in_k, other=0.0)
        b = tl.load(other_rows + k[None, :], mask=in_n[:, None] & in_k, other=0.0)
        if BM == 1:
            each += a.to(tl.float32) * b.to(tl.float32)
        else:
            if UPCAST:
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
    if BM == 1:
        acc = tl.sum(each, 1)[None, :]
    at = out + (piece * tokens + t[:, None]) * stride_out + n[None, :]
    tl.store(at, acc, mask=in_t & in_n[None, :])


@triton.jit(do_not_specialize=["tokens"])
def shrink_kernel(
    x,
    down,
    gate,
    parts,
    tokens,
    stride_x,
    units,
    scores,
    width,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GATE_BK: tl.constexpr,
    SPLIT: tl.constexpr,
    UPCAST: tl.constexpr,
    GATE_UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    GATE_PRECISION: tl.constexpr,
):
    """parts[piece, t] = products of x[t] with `down`, then with the gate's rows.

    The gate may be float32 beside half precision factors: rounded, it would choose other experts.
    """
    tile = tl.program_id(1)
    unit_tiles = tl.cdiv(units, BN)
    stride = units + scores
    if tile < unit_tiles:
        _products(
            x, down, parts, tile, tokens, stride_x, units, width, stride,
            BM, BN, BK, SPLIT, UPCAST, PRECISION,
        )  # fmt: skip
    else:
        _products(
            x, gate, parts + units, tile - unit_tiles, tokens, stride_x, scores, width, stride,
            BM, BN, GATE_BK, SPLIT, GATE_UPCAST, GATE_PRECISION,
        )  # fmt: skip


@triton.jit(do_not_specialize=["tokens"])
def score_kernel(
    x,
    gate,
    parts,
    tokens,
    stride_x,
    scores,
    width,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
    PIECES: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """parts[piece, t, n] = sum over a piece of the width of x[t, k] gate[n, k].

    A float32 entry of the gate is the sum of three bfloat16 numbers, and a product of two bfloat16
    numbers is exact in float32: tensor cores then give what float32 arithmetic would.
    """
    t = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    piece = tl.program_id(2)
    x_rows = x + t[:, None] * stride_x
    gate_rows = gate + n[:, None] * width
    in_t = (t < tokens)[:, None]
    in_n = n < scores
    steps = tl.cdiv(tl.cdiv(width, BK), SPLIT)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for step in range(steps):
        k = (piece * steps + step) * BK + tl.arange(0, BK)
        in_k = (k < width)[None, :]
        a = tl.load(x_rows + k[None, :], mask=in_t & in_k, other=0.0)
        rest = tl.load(gate_rows + k[None, :], mask=in_n[:, None] & in_k, other=0.0)
        for last in tl.static_range(PIECES):
            b = rest.to(a.dtype)
            if UPCAST:
                acc = tl.dot(a.to(tl.float32), tl.trans(b.to(tl.float32)), acc)
            else:
                acc = tl.dot(a, tl.trans(b), acc)
            if last + 1 < PIECES:
                rest -= b.to(tl.float32)
    at = parts + (piece * tokens.to(tl.int64) + t[:, None]) * scores + n[None, :]
    tl.store(at, acc, mask=in_t & in_n[None, :])
