"""Gated units to outputs as a Triton kernel."""

import triton
import triton.language as tl


@triton.jit
def _either(a, b):
    return a | b


@triton.jit(do_not_specialize=["tokens"])
def expand_kernel(
    y,
    z,
    up,
    words,
    out,
    tokens,
    stride_y,
    stride_z,
    stride_words,
    units,
    width,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SKIP: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[t, n] = y[t, n] + sum over units r of z[t, r] up[r, n].

    A row of `up` that no token of the tile uses is not fetched: its load is masked out.
    """
    t = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    n = tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)
    in_t = (t < tokens)[:, None]
    in_n = (n < width)[None, :]
    z_rows = z + t[:, None] * stride_z
    up_columns = up + n[None, :]
    lane = tl.arange(0, 32)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for word in range(tl.cdiv(units, 32)):
        r = word * 32 + lane
        inside = r < units
        live = inside
        if SKIP:
            each = tl.load(words + t * stride_words + word, mask=t < tokens, other=0)
            used = tl.reduce(each, 0, _either)
            live = inside & (((used >> lane) & 1) != 0)
        a = tl.load(z_rows + r[None, :], mask=in_t & inside[None, :], other=0.0)
        at = up_columns + r[:, None].to(tl.int64) * width
        b = tl.load(at, mask=live[:, None] & in_n, other=0.0)
        if UPCAST:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    tile = in_t & in_n
    base = tl.load(y + t[:, None] * stride_y + n[None, :], mask=tile, other=0.0)
    tl.store(out + t[:, None] * width + n[None, :], acc + base.to(tl.float32), mask=tile)
