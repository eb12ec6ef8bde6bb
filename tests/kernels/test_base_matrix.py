"""Both products of a joined matrix against the weights and experts it was made of, in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_merge.kernels.gated_stack import base_matrix


def make(
    d_in: int, outputs: list[int], units: list[int], scores: int, dtype: torch.dtype
) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor, torch.Tensor | None]:
    random = torch.Generator().manual_seed(sum(outputs) + d_in)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)

    weights = [draw(o, d_in) for o in outputs]
    ups = [draw(r, o) for r, o in zip(units, outputs, strict=True)]
    return weights, ups, draw(sum(units), d_in), draw(scores, d_in) if scores else None


modules = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 7)), min_size=1, max_size=3)


@given(st.integers(0, 5), st.integers(1, 20), modules, st.integers(0, 5))
def test_both_ways_are_base_plus_experts(
    tokens: int, d_in: int, shapes: list[tuple[int, int]], scores: int
) -> None:
    outputs, units = [o for o, _ in shapes], [r for _, r in shapes]
    weights, ups, down, gate = make(d_in, outputs, units, scores, torch.float64)
    joined = base_matrix.join(weights, ups, down, gate, border=True)
    narrow = base_matrix.join(weights, ups, down, gate, border=False)
    x = torch.randn(tokens, d_in, dtype=torch.float64)
    zs = [torch.randn(tokens, r, dtype=torch.float64) for r in units]
    expected = [x @ w.T + z @ up for w, z, up in zip(weights, zs, ups, strict=True)]
    ys, u, s = base_matrix.shrink_with_base(x, joined)
    for units_and_scores in ((u, s), base_matrix.shrink_alone(x, joined)):
        torch.testing.assert_close(units_and_scores[0], x @ down.T)
        wanted = x @ gate.T if gate is not None else x.new_zeros(tokens, 0)
        torch.testing.assert_close(units_and_scores[1], wanted)
    narrow_ys = base_matrix.shrink_with_base(x, narrow)[0]
    for outs in (
        base_matrix.expand_after(ys, zs, joined),
        base_matrix.expand_after(narrow_ys, zs, narrow),
        base_matrix.expand_with_base(x, zs, joined),
    ):
        assert all(out.is_contiguous() for out in outs)
        torch.testing.assert_close(outs, expected)


@pytest.mark.parametrize("border", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_everything_put_in_is_there_bit_for_bit(dtype: torch.dtype, border: bool) -> None:
    weights, ups, down, gate = make(13, [8, 5], [3, 6], 4, dtype)
    joined = base_matrix.join(weights, ups, down, gate, border=border)
    held = [*joined.weights, *joined.ups, joined.down, joined.gate]
    assert all(torch.equal(a, b) for a, b in zip(held, [*weights, *ups, down, gate], strict=True))
    storage = joined.matrix.untyped_storage()
    inside = [t for t in held if t.untyped_storage().data_ptr() == storage.data_ptr()]
    assert len(inside) == (6 if border else 4)
    if border:
        assert joined.matrix.stride(0) * joined.matrix.element_size() % 64 == 0
    else:
        assert all(weight.is_contiguous() for weight in joined.weights)


def test_the_corner_is_all_that_is_held_twice() -> None:
    """Four experts of rank 16 on q, k and v of width 512."""
    weights, ups, down, gate = make(512, [512] * 3, [64] * 3, 12, torch.float32)
    parts = sum(t.numel() for t in (*weights, *ups, down, gate))
    joined = base_matrix.join(weights, ups, down, gate, border=True)
    held = joined.matrix[: len(joined.rows)]
    assert held.numel() - parts == (192 + 12) * 64
    joined = base_matrix.join(weights, ups, down, gate, border=False)
    assert joined.rows.numel() == parts - sum(up.numel() for up in ups)
    assert len(joined.padded) == 1744  # of 1740: a multiple of 16


@given(st.integers(1, 40000))
def test_padding_costs_a_hundredth_at_most(rows: int) -> None:
    padded = base_matrix.aligned(rows)
    assert 0 <= padded - rows <= rows / 100
    assert rows < 700 or padded % 8 == 0


@pytest.mark.parametrize("rows", [7068, 4404, 29288, 4404])  # 28 experts of rank 8 on Llama-3-8B
def test_rows_of_a_large_model_are_multiples_of_16(rows: int) -> None:
    assert base_matrix.aligned(rows) % 16 == 0


def test_rows_of_padding_change_nothing() -> None:
    weights, ups, down, gate = make(16, [700, 37], [3, 6], 4, torch.float64)
    joined = base_matrix.join(weights, ups, down, gate, border=False)
    assert len(joined.padded) > len(joined.rows) == 750
    assert torch.equal(joined.gate, gate)
    assert not joined.padded[750:].any()
    x = torch.randn(3, 16, dtype=torch.float64)
    ys, u, scores = base_matrix.shrink_with_base(x, joined)
    for got, rows in zip([*ys, u, scores], [*weights, down, gate], strict=True):
        torch.testing.assert_close(got, x @ rows.T)
