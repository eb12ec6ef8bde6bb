"""Scores to weights in Triton: pieces of a gate for other kernels, and the gate alone."""

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
