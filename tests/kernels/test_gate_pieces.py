"""A float32 gate as rows of bfloat16: nothing of it is lost."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_merge.kernels.gated_stack.gpu.base_matrix_launch import gate_pieces, has_pieces

entries = st.floats(2.0**-60, 2.0**60, width=32) | st.floats(-(2.0**60), -(2.0**-60), width=32)


@given(st.lists(entries | st.just(0.0), min_size=1, max_size=20))
def test_three_rows_of_bfloat16_add_up_to_one_of_float32(row: list[float]) -> None:
    gate = torch.tensor([row, row[::-1]])
    pieces = gate_pieces(gate, torch.bfloat16)
    assert pieces.dtype == torch.bfloat16 and pieces.shape == (6, len(row))
    largest, middle, least = pieces.double().chunk(3)
    assert torch.equal(largest + middle + least, gate.double())
    assert bool((middle.abs() <= largest.abs()).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_stay_whole(dtype: torch.dtype) -> None:
    gate = torch.randn(3, 5)
    assert not has_pieces(gate, dtype) and has_pieces(gate, torch.bfloat16)
    assert not has_pieces(gate.to(torch.bfloat16), torch.bfloat16)
    half = gate.to(dtype)
    assert gate_pieces(half, dtype) is half
