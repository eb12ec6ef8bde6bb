"""Each kernel alone, against float64 products."""

import pytest
import torch

from kernels.stacks import assert_near, owners
from lora_merge.kernels.gate_rule import Rule
from lora_merge.kernels.gated_stack import reference
from lora_merge.kernels.gated_stack.gpu import _launch
from lora_merge.kernels.gated_stack.layout import Layout

Tiles = _launch.Tiles
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def draw(*shape: int, device: str, dtype: torch.dtype = torch.float32, seed: int = 0):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=random).to(device, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "rows", "width", "tiles"),
    [
        (1, 1, 16, Tiles(16, 32, 32)),
        (1, 33, 100, Tiles(1, 16, 32, 2)),  # entry by entry
        (2, 33, 100, Tiles(16, 32, 32, 2)),
        (17, 48, 257, Tiles(16, 32, 64, 4)),
        (5, 7, 3, Tiles(16, 32, 64, 2)),  # the second piece is empty
        (33, 65, 129, Tiles(32, 64, 64, 3)),
    ],
)
def test_shrink(tokens, rows, width, tiles, dtype, device) -> None:
    x = draw(tokens, width, device=device, dtype=dtype)
    weight = draw(rows, width, device=device, dtype=dtype, seed=1)
    gate = draw(7, width, device=device, seed=2)
    parts, scores = _launch.shrink(x, weight, gate, tiles)
    assert parts.shape == (tiles.split, tokens, rows) and parts.dtype == torch.float32
    assert_near(scores.sum(0), x.double() @ gate.double().T, torch.float32, scale=width**0.5)
    # Products of half precision numbers are exact in float32: only sums round.
    assert_near(parts.sum(0), x.double() @ weight.double().T, torch.float32, scale=width**0.5)


def test_shrink_of_rows_that_lie_apart(device) -> None:
    wide = draw(6, 90, device=device)
    x, weight = wide[::2, 5:45], draw(10, 40, device=device, seed=1)
    parts, _ = _launch.shrink(x, weight, None, Tiles(16, 32, 32, 2))
    assert_near(parts.sum(0), x.double() @ weight.double().T, torch.float32)


def bits_of(words: torch.Tensor, units: int) -> torch.Tensor:
    lanes = torch.arange(32, device=words.device)
    return ((words[:, :, None] >> lanes) & 1).flatten(1)[:, :units].bool()


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("ranks", [[1], [3, 5, 1], [8] * 9, [1] * 40])
@pytest.mark.parametrize("rows", [1, 2, 6])
def test_gate_with_given_weights(rows, ranks, block, device) -> None:
    tokens, members, units, count = 6, 2, sum(ranks), len(ranks)
    layout = Layout(owners(ranks).to(device), count, members=members)
    parts = draw(3, tokens, members * units, device=device)
    weights = draw(rows, members * count, device=device, seed=1)
    weights[:, ::2] = 0
    z, words, u = _launch.gate(
        parts, weights[None], layout, torch.float32, keep_u=True, block=block
    )
    total = parts[0] + parts[1] + parts[2]
    each = weights.repeat_interleave(tokens // rows, 0)[:, layout.joined]
    assert torch.equal(u, total)
    assert torch.equal(z, total * each)
    for m in range(members):
        own = words[:, m * layout.num_words : (m + 1) * layout.num_words]
        part = z[:, m * units : (m + 1) * units]
        assert torch.equal(bits_of(own, units), part != 0)


RULES = [
    Rule(value, top_k, temperature, factor)
    for value in ("softmax", "softmax_all", "softmax_twice", "sigmoid", "raw", "binary")
    for top_k, temperature, factor in (
        (None, 1.0, 1.0),
        (2, 0.5, 1.5),
        (1, 1.0, 1.0),
        (7, 2.0, 1.0),
    )
] + [
    Rule("softmax", 3, absolute=True),
    Rule("softmax", 2, null_row=True),
    Rule("softmax", 2, absolute=True, null_score=0.7),
    Rule("softmax_all", None, null_score=-0.5),
]


# A bias is for the selection, of learned scores.
CASES = [(rule, False) for rule in RULES] + [
    (rule, True) for rule in RULES if rule.top_k is not None and rule.null_score is None
]


@pytest.mark.parametrize(("rule", "bias"), CASES, ids=str)
def test_gate_from_scores(rule, bias, device) -> None:
    ranks, tokens, members = [2, 1, 3, 2, 1], 9, 2
    units, scores = sum(ranks), len(ranks) + rule.null_row
    layout = Layout(owners(ranks).to(device), len(ranks), members=members)
    parts = draw(2, tokens, members * (units + scores), device=device)
    extra = draw(members * scores, device=device, seed=2) if bias else None
    z, words, _ = _launch.gate(
        parts[:, :, : members * units], parts[:, :, members * units :], layout, torch.float32,
        rule=rule, bias=extra, block=4,
    )  # fmt: skip
    total = parts.sum(0).double()
    for m in range(members):
        u = total[:, m * units : (m + 1) * units]
        first = members * units + m * scores
        own = None if extra is None else extra[m * scores : (m + 1) * scores].double()
        weights = [reference.gate_weights(row[first : first + scores], rule, own) for row in total]
        expected = u * torch.stack(weights)[:, layout.columns]
        got = z[:, m * units : (m + 1) * units]
        assert_near(got, expected, torch.float32)
        assert torch.equal(got != 0, expected != 0)
        word = words[:, m * layout.num_words : (m + 1) * layout.num_words]
        assert torch.equal(bits_of(word, units), got != 0)


def test_of_equal_scores_the_first_are_kept(device) -> None:
    layout = Layout(torch.arange(6, device=device), 6)
    parts = torch.ones(1, 2, 12, device=device)
    z, _, _ = _launch.gate(
        parts[:, :, :6], parts[:, :, 6:], layout, torch.float32, rule=Rule("raw", 2)
    )
    assert z.tolist() == [[1, 1, 0, 0, 0, 0]] * 2


def test_a_gate_over_two_thousand_single_ranks(device) -> None:
    units = 2048
    layout = Layout(torch.arange(units, device=device), units)
    parts = draw(1, 3, 2 * units, device=device)
    z, words, _ = _launch.gate(
        parts[:, :, :units], parts[:, :, units:], layout, torch.float32,
        rule=Rule("softmax", 16), block=4,
    )  # fmt: skip
    assert words.shape == (3, 64)
    assert (z != 0).sum(1).tolist() == [16] * 3
    assert torch.equal(bits_of(words, units), z != 0)
    best = parts[0, :, units:].topk(16).indices.sort().values
    assert torch.equal(z.nonzero()[:, 1].view(3, 16), best)


EXPANDS = [Tiles(16, 32), Tiles(32, 64)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tiles", EXPANDS, ids=["small", "large"])
@pytest.mark.parametrize(("tokens", "units", "width"), [(1, 1, 1), (17, 33, 70), (2, 100, 129)])
def test_expand(tokens, units, width, tiles, dtype, device) -> None:
    y = draw(tokens, width, device=device, dtype=dtype)
    z = draw(tokens, units, device=device, dtype=dtype, seed=1)
    up = draw(units, width, device=device, dtype=dtype, seed=2)
    got = _launch.expand(y, z, up, None, tiles)
    assert_near(got, y.double() + z.double() @ up.double(), dtype, scale=units**0.5)


@pytest.mark.parametrize("tiles", EXPANDS, ids=["small", "large"])
def test_rows_that_no_token_of_a_tile_uses_are_not_read(tiles, device) -> None:
    """They hold NaN here, which any product would spread."""
    tokens, units, width = 40, 150, 50
    z = draw(tokens, units, device=device)
    used = torch.rand(units, generator=torch.Generator().manual_seed(3)).to(device) < 0.2
    used[64:96] = False  # a whole word
    z[:, ~used] = 0
    up = draw(units, width, device=device, seed=1)
    expected = z.double() @ up.double()
    up[~used] = torch.nan
    words = torch.zeros(tokens, 5, dtype=torch.int64, device=device)
    for r in used.nonzero().flatten().tolist():
        words[:, r // 32] |= 1 << (r % 32)
    words = torch.where(words >= 1 << 31, words - (1 << 32), words).int()
    y = torch.zeros(tokens, width, device=device)
    assert_near(_launch.expand(y, z, up, words, tiles), expected, torch.float32)


def test_nothing_used_gives_the_base_back(device) -> None:
    y, z = draw(5, 33, device=device), torch.zeros(5, 40, device=device)
    up = torch.full((40, 33), torch.nan, device=device)
    words = torch.zeros(5, 2, dtype=torch.int32, device=device)
    assert torch.equal(_launch.expand(y, z, up, words, Tiles(16, 32)), y)
