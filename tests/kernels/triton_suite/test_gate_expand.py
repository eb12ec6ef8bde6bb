"""Gate and expand as one kernel, against the specification: members, pieces, rules, dtypes."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.stacks import assert_near, owners
from lora_merge.kernels.gate_rule import Rule
from lora_merge.kernels.gated_stack import reference
from lora_merge.kernels.gated_stack.gpu import _launch, fused
from lora_merge.kernels.gated_stack.layout import Ungated

RULES = [
    *(Rule(value, k, 0.7, 1.5) for value in ("softmax", "softmax_all", "raw") for k in (None, 2)),
    Rule("softmax_twice", 2),
    Rule("sigmoid", 3),
    Rule("binary", 2),
    Rule("softmax", 2, absolute=True, null_score=0.5),
    Rule("softmax", 2, null_row=True),
]


def draw(*shape: int, device: str, dtype: torch.dtype = torch.float32, seed: int = 0):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=random).to(device, dtype)


def check(
    tokens: int,
    ranks: list[int],
    widths: tuple[int, ...],
    rule: Rule | None,
    device: str,
    *,
    dtype: torch.dtype = torch.float32,
    pieces: tuple[int, int] = (1, 1),
    rows: int | None = None,
    bias: bool = False,
) -> None:
    """Members side by side in one wide tensor, as the joined layout has them."""
    members, units = len(widths), sum(ranks)
    count = len(ranks) + (rule is not None and rule.null_row)
    parts = draw(pieces[0], tokens, members * units + 5, device=device)[:, :, 3:-2]
    scores = draw(pieces[1], rows or tokens, members * count, device=device, seed=1)
    y = draw(tokens, sum(widths) + 2, device=device, seed=2)[:, 1:-1]
    ups = [draw(units, w, device=device, dtype=dtype, seed=3 + w) for w in widths]
    extra = draw(members * count, device=device, seed=4) if bias else None
    all_units = Ungated(parts, scores, owners(ranks).to(device), dtype, rule, extra)
    flat = torch.cat([up.flatten() for up in ups])
    tiles = _launch.gate_expand_tiles(tokens, sum(widths), flat.element_size())
    out = _launch.gate_expand(
        y, parts, scores, flat, widths, all_units.columns, tiles, dtype, rule=rule, bias=extra
    )
    assert out.dtype == dtype and out.shape == (tokens * sum(widths),)
    each = all_units.members(members)
    for got, one, base, up in zip(
        out.split([tokens * w for w in widths]), each, y.split(widths, 1), ups, strict=True
    ):
        total = one.scores.sum(0).double()
        weights = total.repeat_interleave(tokens // len(total), 0)
        if rule is not None:
            own = None if one.bias is None else one.bias.double()
            weights = torch.stack([reference.gate_weights(row, rule, own) for row in weights])
        z = one.parts.sum(0).double() * weights[:, one.columns]
        expected = reference.expand(base, z, up)
        scale = float((z.abs() @ up.double().abs()).max())
        assert_near(got.view(base.shape), expected, dtype, scale=scale)
        alone = fused.gate_expand(base, one, up)
        assert alone.dtype == y.dtype
        assert_near(alone, expected, dtype, scale=scale)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("tokens", [1, 5])
def test_every_rule(rule, tokens, device) -> None:
    bias = rule.top_k is not None and rule.null_score is None
    check(tokens, [2, 1, 3, 2], (9, 40, 5), rule, device, bias=bias)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 16])
def test_half_precision_and_pieces(tokens, dtype, device) -> None:
    check(tokens, [8] * 5, (33, 64), Rule("softmax", 2), device, dtype=dtype, pieces=(4, 3))


@pytest.mark.parametrize("rows", [1, 2, 6])
def test_given_weights(rows, device) -> None:
    check(6, [3, 1, 4], (20, 30), None, device, rows=rows)


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_any_shape(data: st.DataObject) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ranks = data.draw(st.lists(st.integers(1, 60), min_size=1, max_size=9))
    widths = tuple(data.draw(st.lists(st.integers(1, 130), min_size=1, max_size=4)))
    top_k = data.draw(st.none() | st.integers(1, len(ranks)))
    check(data.draw(st.integers(1, 16)), ranks, widths, Rule("softmax", top_k), device)


def test_units_beyond_one_chunk(device) -> None:
    check(1, [64] * 9, (20,), Rule("softmax", 2), device)
    check(3, [64] * 9, (20,), Rule(), device)


def test_rows_that_nobody_uses_take_no_part(device) -> None:
    """They hold NaN here, which any product would spread; 16 tokens read them, one does not."""
    tokens, ranks = 16, [3, 4, 2]
    scores = torch.tensor([[3.0, 0.0, -1.0], [2.0, -3.0, 0.0]], device=device).repeat(1, 8, 1)
    assert _launch._skips(Rule("softmax", 1), 3, 1) and not _launch._skips(
        Rule("softmax", 1), 3, 16
    )
    up = draw(9, 12, device=device)
    up[3:7] = torch.nan  # the second expert is the first choice of neither
    units = Ungated(draw(1, tokens, 9, device=device), scores, owners(ranks).to(device),
                    torch.float32, Rule("softmax", 1))  # fmt: skip
    y = draw(tokens, 12, device=device, seed=5)
    for rows in (slice(0, 1), slice(0, 2), slice(0, 16)):
        part = replace(units, parts=units.parts[:, rows], scores=units.scores[:, rows])
        assert fused.gate_expand(y[rows], part, up).isfinite().all()
