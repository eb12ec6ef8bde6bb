"""Grouping tokens by expert: what needs neither a GPU nor Triton."""

from dataclasses import replace

import pytest
import torch

from kernels.stacks import make_stack, owners
from lora_merge.errors import LoraMergeWarning, MethodError
from lora_merge.kernels.gate_rule import Rule
from lora_merge.kernels.gated_stack import dispatch, tune_cases
from lora_merge.kernels.gated_stack import tune as tuning
from lora_merge.kernels.gated_stack.gpu import grouped
from lora_merge.kernels.gated_stack.layout import Layout, Places, Units
from lora_merge.kernels.gated_stack.operation import chosen, gated_expand
from lora_merge.kernels.gated_stack.tune import tune
from lora_merge.kernels.gated_stack.tune_cases import StackShape

TOP2 = Rule("softmax", 2)
CPU = torch.device("cpu")


def layout_of(*columns: int, count: int) -> Layout:
    return Layout(torch.tensor(columns, dtype=torch.int64), count)


def test_where_the_units_of_an_expert_stand() -> None:
    table, widest = layout_of(2, 2, 2, 0, 3, 3, count=5).segments
    assert table.tolist() == [[3, 1], [0, 0], [0, 3], [4, 2], [0, 0]] and widest == 3
    even = Layout(owners([4] * 3), 3, 4)
    table, widest = even.segments
    assert torch.equal(table, replace(even, block=None).segments[0]) and widest == 4
    assert layout_of(0, 1, 0, count=2).segments is None
    assert layout_of(count=2).segments[1] == 0


@pytest.mark.parametrize(
    ("ranks", "rule", "fits"),
    [
        ([2, 3, 4], TOP2, True),
        ([2, 3, 4], Rule(), False),
        ([2, 3, 4], Rule("raw", 3), False),
        ([2, 3, 4], Rule("raw", 3, null_row=True), True),
        ([2, 3, 4], Rule("raw", 3, null_score=0.0), True),
        ([128, 3, 4], TOP2, True),
        ([129, 3, 4], TOP2, False),
        ([1] * 256, TOP2, True),
        ([1] * 256, Rule("raw", 16), True),
        ([1] * 256, Rule("raw", 17), False),
        ([1] * 257, TOP2, False),
    ],
)
def test_which_gates_can_be_grouped(ranks: list[int], rule: Rule, fits: bool) -> None:
    assert grouped.fits(Layout(owners(ranks), len(ranks)), rule) == fits


def test_only_gates_that_keep_some_may_be_grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "grouped")
    monkeypatch.setattr(tuning.fused, "refusal", lambda *_: "")
    stack = make_stack(3, [2, 2, 2])
    assert chosen(stack.x, stack.down, stack.layout, "top-k") == "grouped"
    assert chosen(stack.x, stack.down, stack.layout, "dense") == "eager"
    assert chosen(stack.x, stack.down, stack.layout, "given") == "eager"


# Three tokens in blocks of two, two slots, experts 0 (units 1 and 2) and 1 (unit 0): token 0 keeps
# both, token 1 the second alone, and token 2 has scores that are not numbers.
PLACES = Places(
    order=torch.tensor([[[0, 7], [1, 2], [7, 7]], [[0, 7], [7, 7], [7, 7]]], dtype=torch.int32),
    blocks=torch.tensor([[[0, 1], [2, 2], [-1, 0]], [[1, 1], [-1, 0], [-1, 0]]], dtype=torch.int32),
    weights=torch.tensor([[0.5, 0.0, torch.nan], [0.5, 0.0, torch.nan]]),
    segments=torch.tensor([[1, 2], [0, 1]], dtype=torch.int32),
    num_units=3,
)
EMPTY = -9.0
Z = torch.tensor([
    [[[5.0, 6.0], [EMPTY, EMPTY]], [[EMPTY, EMPTY]] * 2, [[EMPTY, EMPTY]] * 2],
    [[[4.0, EMPTY], [EMPTY, EMPTY]], [[EMPTY, EMPTY]] * 2, [[EMPTY, EMPTY]] * 2],
])  # fmt: skip


def test_grouped_units_ungrouped() -> None:
    nan = torch.nan
    expected = torch.tensor([[4.0, 5.0, 6.0], [0.0, 0.0, 0.0], [nan, nan, nan]])
    got = grouped.ungrouped(Z, PLACES)
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.nan_to_num(), expected.nan_to_num())


def test_expanding_grouped_units_without_a_kernel() -> None:
    y, up = torch.zeros(3, 4), torch.arange(12.0).view(3, 4)
    units = Units(Z, None, "grouped", PLACES)
    out = gated_expand(y, units, up, implementation="eager")
    assert torch.equal(out[:2], torch.stack([4 * up[0] + 5 * up[1] + 6 * up[2], torch.zeros(4)]))
    assert out[2].isnan().all()
    with pytest.raises(MethodError, match=r"up has shape \(2, 4\), expected \(3, 4\)"):
        gated_expand(y, units, up[:2])
    with pytest.raises(MethodError, match="weights has shape"):
        gated_expand(y[:2], units, up)


@pytest.mark.parametrize("fault", [None, "fails", "differs"])
def test_grouping_is_timed_where_it_may_pay_and_is_right(fault, monkeypatch) -> None:
    stacked = tune_cases._stacked

    def run(x, modules, layout, rule, how):
        outputs = stacked(x, modules, layout, rule, "eager")
        if how == "grouped" and fault == "fails":
            with pytest.warns(LoraMergeWarning, match="eager runs instead"):
                dispatch.guarded("grouped_shrink", broken, lambda: None)
            return outputs
        return [y * 1.01 for y in outputs] if how == "grouped" and fault else outputs

    def broken():
        raise RuntimeError("no such instruction")

    def quick(work, device, **how):
        return {name: tuning.Timing(1.0, 1.0, 1.0, 1) for name in work}

    monkeypatch.setattr(tune_cases, "_stacked", run)
    monkeypatch.setattr(dispatch, "_failed", {})
    monkeypatch.setattr(tuning, "measure", quick)
    monkeypatch.setattr(tune_cases, "_COLD", 1)
    monkeypatch.setattr(tuning.fused, "refusal", lambda *_: "")
    few, many = StackShape(8, (6,), (1,) * 7), StackShape(8, (6,), (1,) * 8)
    tried = {
        (len(shape.ranks), row.case.tokens, row.case.gate)
        for shape in (few, many)
        for row in tune([shape], CPU, torch.float32, tokens=[255, 256])
        if "grouped" in {**row.timings, **row.excluded}
    }
    assert tried == {(8, 256, "top-k")}
    *_, row = tune([many], CPU, torch.float32, tokens=[256])
    assert ("grouped" in row.timings) == (fault is None)
    reason = {None: "", "fails": "no such instruction", "differs": "not those of eager"}[fault]
    assert reason in row.excluded.get("grouped", "")
    assert "triton" in row.timings
