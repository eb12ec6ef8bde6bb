"""Shrink, gate and expand as Triton kernels. Imported only when they are chosen.

    shrink   partial sums of x [down; gate rows]^T, the width cut into SPLIT pieces
    score    the same of the gate's rows alone, for many tokens
    gate     the pieces added in a fixed order, scores to weights, z = g u, and a bit per unit
    expand   y + z up, reading only the rows of `up` whose bit some token of the tile has set

Few tokens take gate and expand in one (`_triton_gate_expand.py`), with the same arithmetic. No
atomics, no sorting, nothing whose shape depends on data, no word from the device to the host: a
CUDA graph can hold it, and the same input gives the same bits. The number of tokens is an ordinary
argument, so no batch size compiles anew.
"""

import triton
import triton.language as tl

# How weights are made; what Triton sees is the place in the tuple.
KINDS = ("given", "softmax", "softmax_all", "softmax_twice", "sigmoid", "raw", "binary")
_GIVEN = tl.constexpr(0)
_SOFTMAX = tl.constexpr(1)
_SOFTMAX_ALL = tl.constexpr(2)
_SOFTMAX_TWICE = tl.constexpr(3)
_SIGMOID = tl.constexpr(4)
_BINARY = tl.constexpr(6)


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


@triton.jit
def sum_of_pieces(row, step, at, inside, SPLIT: tl.constexpr):
    """Pieces of some entries of each row added in their order, float32, in the shape of `at`."""
    total = tl.load(row + at, mask=inside, other=0.0).to(tl.float32)
    for piece in tl.static_range(1, SPLIT):
        total += tl.load(row + piece * step + at, mask=inside, other=0.0).to(tl.float32)
    return total


@triton.jit
def gate_facts(
    row,
    step,
    bias_row,
    here,
    scores,
    temperature,
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
    """What a token's scores say together; with it `weight_at` makes any weight from its own score.

    So a unit's weight needs its score alone, from memory, and no exchange between threads, which
    `tl.gather` is: Triton 3.6 to 3.8 cannot compile it for a single row.

    Returns:
        Each (BT, 1): NaN if a score is, else 0; value and place of the last score that is kept; the
        largest and the sum of all for a softmax over all; the same for one over the kept.
    """
    flaw = tl.zeros((BT, 1), tl.float32)
    least = tl.full((BT, 1), float("inf"), tl.float32)
    last = tl.full((BT, 1), -1, tl.int32)
    top_all = tl.zeros((BT, 1), tl.float32)
    sum_all = tl.zeros((BT, 1), tl.float32)
    top = tl.zeros((BT, 1), tl.float32)
    total = tl.zeros((BT, 1), tl.float32)
    if KIND != _GIVEN:
        e = tl.arange(0, BS)[None, :]
        s = sum_of_pieces(row, step, e, here & (e < scores), SPLIT)
        flaw = tl.where(tl.max(tl.where(s == s, 0, 1), 1)[:, None] > 0, float("nan"), 0.0)
        valid = e < scores + NULL
        if ABSOLUTE:
            s = tl.abs(s)
        if NULL:
            s = tl.where(e == scores, null_score, s)
        g = s
        if KIND == _SOFTMAX_ALL or KIND == _SOFTMAX_TWICE:
            s = s / temperature
            top_all = tl.max(tl.where(valid, s, float("-inf")), 1)[:, None]
            each = tl.exp(s - top_all)
            sum_all = tl.sum(tl.where(valid, each, 0.0), 1)[:, None]
            g = each / sum_all
        kept = valid
        if TOP_K > 0:
            judged = g
            if BIAS:
                judged += tl.load(bias_row + e, mask=e < scores, other=0.0).to(tl.float32)
            kept = here & (
                e < 0
            )  # lanes, not a number for each token: 3.6 copies all lanes for that
            for _ in range(TOP_K):
                left = tl.where(valid & (kept == 0), judged, float("-inf"))
                most = left == tl.max(left, 1)[:, None]
                first = tl.min(tl.where(most & valid & (kept == 0), e, BS), 1)[:, None]
                kept = kept | (e == first)
            least = tl.min(tl.where(kept, judged, float("inf")), 1)[:, None]
            last = tl.max(tl.where(kept & (judged == least), e, -1), 1)[:, None]
        if KIND == _SOFTMAX or KIND == _SOFTMAX_TWICE:
            if KIND == _SOFTMAX:
                g = s / temperature
            top = tl.max(tl.where(kept, g, float("-inf")), 1)[:, None]
            total = tl.sum(tl.where(kept, tl.exp(g - top), 0.0), 1)[:, None]
    return flaw, least, last, top_all, sum_all, top, total


@triton.jit
def weight_at(
    s,
    at,
    bias_row,
    inside,
    temperature,
    factor,
    facts,
    KIND: tl.constexpr,
    TOP_K: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    BIAS: tl.constexpr,
):
    """Weights of the experts `at`, of their scores `s`, from the facts of `gate_facts`.

    Exactly zero outside the kept; of equal scores the first are kept.
    """
    g = s
    if KIND != _GIVEN:
        flaw, least, last, top_all, sum_all, top, total = facts
        if ABSOLUTE:
            s = tl.abs(s)
        g = s
        if KIND == _SOFTMAX_ALL or KIND == _SOFTMAX_TWICE:
            g = tl.exp(s / temperature - top_all) / sum_all
        kept = s == s
        if TOP_K > 0:
            judged = g
            if BIAS:
                judged += tl.load(bias_row + at, mask=inside, other=0.0).to(tl.float32)
            kept = (judged > least) | ((judged == least) & (at <= last))
        if KIND == _SOFTMAX:
            g = tl.exp(s / temperature - top) / total
        elif KIND == _SOFTMAX_TWICE:
            g = tl.exp(g - top) / total
        elif KIND == _SIGMOID:
            g = 1.0 / (1.0 + tl.exp(-s / temperature))
        elif KIND == _BINARY:
            g = tl.full(s.shape, 1.0, tl.float32)
        g = tl.where(kept, g * factor, 0.0) + flaw
    return g


@triton.jit(do_not_specialize=["tokens", "share"])
def gate_kernel(
    parts,
    score_parts,
    columns,
    bias,
    z,
    words,
    u_out,
    tokens,
    share,
    stride_parts,
    stride_scores,
    part_step,
    score_step,
    units,
    scores,
    num_words,
    temperature,
    factor,
    null_score,
    MEMBERS: tl.constexpr,
    SPLIT: tl.constexpr,
    SCORE_SPLIT: tl.constexpr,
    KIND: tl.constexpr,
    TOP_K: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    NULL: tl.constexpr,
    BIAS: tl.constexpr,
    KEEP_U: tl.constexpr,
    BT: tl.constexpr,
    BS: tl.constexpr,
    BR: tl.constexpr,
):
    """Z = g u of one token and member, and a bit for each unit that is not zero."""
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    m = tl.program_id(1).to(tl.int64)
    here = (t < tokens)[:, None]
    unit_row = parts + (t * stride_parts)[:, None] + m * units
    score_row = score_parts + (t // share * stride_scores)[:, None] + m * scores
    facts = gate_facts(
        score_row, score_step, bias + m * scores, here, scores, temperature, null_score,
        SCORE_SPLIT, KIND, TOP_K, ABSOLUTE, NULL, BIAS, BT, BS,
    )  # fmt: skip
    for start in range(0, units, BR):
        r = start + tl.arange(0, BR)[None, :]
        inside = here & (r < units)
        u = sum_of_pieces(unit_row, part_step, r, inside, SPLIT)
        column = tl.load(columns + r, mask=r < units, other=0).to(tl.int32)
        own = weight_at(
            sum_of_pieces(score_row, score_step, column, inside, SCORE_SPLIT), column,
            bias + m * scores, inside, temperature, factor, facts, KIND, TOP_K, ABSOLUTE, BIAS,
        )  # fmt: skip
        gated = u * own
        at_unit = (t * MEMBERS * units)[:, None] + m * units + r
        tl.store(z + at_unit, gated, mask=inside)
        if KEEP_U:
            tl.store(u_out + at_unit, u, mask=inside)
        used = tl.where(inside & (gated != 0.0), 1, 0)
        bits = tl.reshape(used, (BT, BR // 32, 32)) << tl.arange(0, 32)[None, None, :]
        w = start // 32 + tl.arange(0, BR // 32)[None, :]
        at_word = ((t * MEMBERS + m) * num_words)[:, None] + w
        tl.store(words + at_word, tl.sum(bits, axis=2), mask=here & (w < num_words))


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
