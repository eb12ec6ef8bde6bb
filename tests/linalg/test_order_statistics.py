"""Order statistics of a stream against a sort."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_merge.linalg.order_statistics import Bracket, kth_largest, sample_brackets

_floats = st.one_of(
    st.floats(0, 2.0**100, width=32),
    st.sampled_from([0.0, 1e-40, 1.0, 1.0000001, 65536.0]),
)


def _stream(values: torch.Tensor, pieces: int):
    def sweep(visit):
        for part in values.chunk(pieces):
            visit(3, part)

    return sweep


@given(
    values=st.lists(_floats, min_size=1, max_size=60),
    ranks=st.lists(st.integers(1, 60), min_size=1, max_size=3),
    pieces=st.integers(1, 5),
    double=st.booleans(),
    ends=st.one_of(st.none(), st.tuples(_floats, _floats)),
)
def test_equals_the_sorted_stream_whatever_the_bracket(values, ranks, pieces, double, ends):
    x = torch.tensor(values, dtype=torch.float64 if double else torch.float32)
    ranks = [min(rank, len(values)) for rank in ranks]
    brackets = None if ends is None else {3: [Bracket(min(ends), max(ends))] * len(ranks)}
    found = kth_largest(_stream(x, pieces), lambda _, n: ranks, [3], brackets=brackets)
    expected = x.sort(descending=True).values
    assert found == {3: [float(expected[rank - 1]) for rank in ranks]}


def test_ranks_see_the_number_of_values_and_rank_0_keeps_nothing():
    x = torch.arange(10, dtype=torch.float32)
    seen = []
    found = kth_largest(_stream(x, 2), lambda _, n: seen.append(n) or [0, n], [3])
    assert (found, seen) == ({3: [float("inf"), 0.0]}, [10])


def test_a_sampled_bracket_holds_its_quantile_and_little_else():
    random = torch.Generator().manual_seed(0)
    x = torch.randn(200_000, generator=random).abs()
    sample = x[torch.randint(len(x), (1 << 14,), generator=random)]
    (bracket,) = sample_brackets(sample, [0.2])
    inside = ((x >= bracket.low) & (x <= bracket.high)).double().mean()
    assert bracket.low < x.sort(descending=True).values[40_000] < bracket.high
    assert inside < 0.04


def test_a_bracket_that_catches_too_much_is_given_up(monkeypatch):
    monkeypatch.setattr("lora_merge.linalg.order_statistics._MOST_CAUGHT", 10)
    x = torch.arange(1000, dtype=torch.float32)
    found = kth_largest(_stream(x, 9), lambda _, n: [500], [3], brackets={3: [Bracket(0.0, 1e9)]})
    assert found == {3: [500.0]}
