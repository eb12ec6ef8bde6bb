"""Tokens grouped by expert, on Triton kernels, against the specification."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from builders import save_adapter
from kernels.stacks import Stack, assert_near, make_stack, owners
from lora_merge.errors import LoraMergeWarning
from lora_merge.kernels.gate_rule import Rule
from lora_merge.kernels.gated_stack import dispatch, reference
from lora_merge.kernels.gated_stack.gpu import _launch, _launch_grouped, grouped
from lora_merge.kernels.gated_stack.layout import Layout, Units
from lora_merge.kernels.gated_stack.operation import gated_expand, routed_shrink
from lora_merge.mixture.mixture import Mixture
from lora_merge.mixture.runtime.attach import load_mixture
from mixture.tiny import llama, shapes_of, tokens

BLOCK = _launch_grouped.BLOCK
TOP2 = Rule("softmax", 2)
RANKS = [3, 9, 1, 20, 2]


def shrunk(stack: Stack) -> list[Units]:
    """Without the fall-back, so that a failure is one."""
    assert grouped.fits(stack.layout, stack.rule)
    arguments = stack.x, stack.down, stack.gate, stack.bias, stack.layout, stack.rule
    return grouped.routed_shrink(*arguments)


def expanded(stack: Stack) -> list[torch.Tensor]:
    return [
        grouped.expand(y, units.z, up, units.places)
        for y, units, up in zip(stack.ys, shrunk(stack), stack.ups, strict=True)
    ]


def check(stack: Stack) -> None:
    for got, expected in zip(expanded(stack), stack.expected(), strict=True):
        assert got.dtype == stack.x.dtype
        assert_near(got, expected, stack.x.dtype)


VALUES = ("softmax", "softmax_all", "softmax_twice", "sigmoid", "raw", "binary")
RULES = [
    Rule(value, top_k, temperature, factor)
    for value in VALUES
    for top_k, temperature, factor in ((1, 1.0, 1.0), (2, 0.5, 1.5), (3, 2.0, 1.0))
] + [
    Rule("softmax", 3, absolute=True),
    Rule("softmax", 2, null_row=True),
    Rule("softmax", 1, absolute=True, null_score=0.7),
    Rule("softmax_all", 2, null_score=-0.5),
]
CASES = [(rule, False) for rule in RULES] + [
    (rule, True)
    for rule in RULES
    if rule.top_k == 2 and rule.value.startswith("softmax") and rule.null_score is None
]


@pytest.mark.parametrize(("rule", "bias"), CASES, ids=str)
def test_every_rule(rule, bias, device) -> None:
    check(make_stack(11, [2, 1, 3, 2], d_in=20, d_out=(9,), rule=rule, bias=bias, device=device))


@pytest.mark.parametrize(
    ("count", "dtype", "gate_dtype"),
    [
        (1, torch.float32, None),
        (BLOCK, torch.float16, None),
        (2 * BLOCK + 1, torch.bfloat16, torch.float32),
        (BLOCK + 7, torch.float16, torch.float32),
        (BLOCK - 1, torch.bfloat16, None),
    ],
)
def test_uneven_ranks_and_widths_that_fit_no_tile(count, dtype, gate_dtype, device) -> None:
    check(make_stack(count, RANKS, d_in=77, d_out=(45,), rule=TOP2, dtype=dtype,
                     gate_dtype=gate_dtype, device=device))  # fmt: skip


@pytest.mark.parametrize("members", [2, 3])
def test_modules_that_share_their_input(members, device) -> None:
    widths = (45, 19, 130)[:members]
    check(make_stack(40, RANKS, d_in=33, d_out=widths, rule=TOP2, bias=True, device=device))


def test_slots_that_write_the_output_in_bands(device, monkeypatch) -> None:
    """And in several programs, each with several tiles."""
    monkeypatch.setattr(_launch_grouped, "_CACHE", 0)
    monkeypatch.setattr(_launch_grouped, "_OFTEN", 2)
    monkeypatch.setattr(_launch_grouped, "_columns", lambda _: 16)
    check(make_stack(9, [2, 1, 3, 2], d_in=20, d_out=(75,), rule=TOP2, device=device))


def test_the_widest_experts(device) -> None:
    check(make_stack(5, [128, 3, 70, 1], d_in=20, d_out=(70,), rule=TOP2, device=device))


def test_more_tokens_than_a_tile_and_a_hundred_experts(device) -> None:
    stack = make_stack(35, [1] * 130, d_in=24, d_out=(5,), rule=Rule("raw", 1), device=device)
    check(stack)


@pytest.mark.parametrize("wanted", [(2,), (0, 3)])
def test_all_tokens_on_some_experts(wanted, device) -> None:
    """The others have no block."""
    stack = make_stack(70, [2, 1, 3, 2], d_in=20, d_out=(9,), device=device,
                       rule=Rule("raw", len(wanted)))  # fmt: skip
    bias = torch.zeros(4, device=device)
    bias[list(wanted)] = 100.0
    check(replace(stack, bias=bias))
    (units,) = shrunk(replace(stack, bias=bias))
    blocks = units.places.blocks
    for slot, expert in enumerate(wanted):
        used = blocks[slot][blocks[slot, :, 0] >= 0]
        assert used.tolist() == [[expert, n] for n in (BLOCK, BLOCK, 70 - 2 * BLOCK)]


def test_of_equal_scores_the_first_are_kept(device) -> None:
    stack = make_stack(40, [1] * 6, rule=Rule("binary", 2), device=device)
    stack.gate.zero_()
    check(stack)
    (units,) = shrunk(stack)
    blocks = units.places.blocks[..., 0]
    assert blocks.amax(1).tolist() == [0, 1]


def placed(taken: torch.Tensor, experts: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Order and blocks of tokens whose experts are given, shape (M, k, T)."""
    tiles = taken.split(16, dim=2)
    counts = [torch.stack([(tile == e).sum(2) for e in range(experts)], 2) for tile in tiles]
    both = taken.int().to(device), torch.stack(counts, 2).int().to(device)
    return _launch_grouped.place(*both, 16)


def test_tokens_stand_in_order_of_expert_and_then_as_they_came(device) -> None:
    """As a stable sort would put them; those of empty slots last, and in slot 0 alone."""
    experts, random = 5, torch.Generator().manual_seed(1)
    taken = torch.randint(0, experts + 1, (2, 2, 300), generator=random)
    taken[taken == 3] = 4  # nobody takes it
    order, blocks = placed(taken, experts, device)
    for m, slot in ((0, 0), (0, 1), (1, 0), (1, 1)):
        own = taken[m, slot]
        there = own.argsort(stable=True)
        there = there if slot == 0 else there[own[there] < experts]
        tokens, of = [], []
        for (expert, size), row in zip(blocks[m, slot].tolist(), order[m, slot], strict=True):
            assert 0 <= size <= BLOCK and (size > 0) == (expert >= 0)
            tokens += row[:size].tolist()
            of += [expert] * size
        assert tokens == there.tolist()
        assert of == own[there].tolist()


def test_there_are_blocks_enough_when_every_last_one_holds_one_token(device) -> None:
    taken = torch.tensor([0] * (BLOCK + 1) + [1] * (2 * BLOCK + 1) + [2, 3])[None, None]
    _, blocks = placed(taken, 3, device)
    full = [[0, BLOCK], [0, 1], [1, BLOCK], [1, BLOCK], [1, 1], [2, 1], [3, 1]]
    assert blocks[0, 0].tolist() == full


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of what is asked for here
@pytest.mark.parametrize("rule", [TOP2, Rule("binary", 1), Rule("sigmoid", 2)], ids=str)
def test_nan_stays_in_its_row(rule, device) -> None:
    stack = make_stack(40, [3] * 4, d_in=50, rule=rule, device=device)
    expected = stack.expected()[0]
    stack.x[7, 3] = torch.nan
    stack.x[11, 0] = torch.inf
    (units,) = shrunk(stack)
    out = grouped.expand(stack.ys[0], units.z, stack.ups[0], units.places)
    assert out[7].isnan().all() and not out[11].isfinite().any()
    clean = [t for t in range(40) if t not in (7, 11)]
    assert_near(out[clean], expected[clean], torch.float32)
    assert grouped.ungrouped(units.z, units.places)[7].isnan().all()


def test_a_weight_of_zero_takes_no_part(device) -> None:
    """Whatever its expert holds; and a token of zero weights alone keeps its row."""
    stack = make_stack(40, [3] * 4, rule=Rule("raw", 2, absolute=True), device=device)
    stack.gate[1:] = 0
    stack.x[5] = 0
    stack.down[3:], stack.ups[0][3:] = torch.nan, torch.nan
    (out,) = expanded(stack)
    assert torch.equal(out[5], stack.ys[0][5])
    weights = (stack.x.double() @ stack.gate[:1].double().T).abs()
    z = weights * (stack.x.double() @ stack.down[:3].double().T)
    assert_near(out, stack.ys[0].double() + z @ stack.ups[0][:3].double(), torch.float32)


def test_tokens_in_any_strides(device) -> None:
    stack = make_stack(40, [3, 4, 1], d_in=40, d_out=(30,), rule=TOP2, device=device)
    expected = stack.expected()[0]
    apart = torch.full((40, 80), torch.nan, device=device)
    apart[:, ::2] = stack.x.T
    wide = torch.zeros(40, 70, device=device)
    wide[:, 20:50] = stack.ys[0]
    for x in (apart[:, ::2].T, stack.x.view(8, 5, 40)):
        (units,) = routed_shrink(
            x, stack.down, stack.gate, stack.layout, TOP2, implementation="grouped"
        )
        out = gated_expand(wide[:, 20:50], units, stack.ups[0])
        assert_near(out, expected, torch.float32)
        assert torch.equal(wide[:, 20:50], stack.ys[0])


def test_a_token_is_the_same_bits_in_any_company(device) -> None:
    stack = make_stack(75, [5] * 5, d_in=80, d_out=(20,), rule=TOP2, dtype=torch.bfloat16,
                       gate_dtype=torch.float32, device=device)  # fmt: skip
    (whole,) = expanded(stack)
    assert torch.equal(expanded(stack)[0], whole)
    shuffled = torch.randperm(75, generator=torch.Generator().manual_seed(2)).to(device)
    for some in (shuffled, shuffled[:1]):
        (part,) = expanded(replace(stack, x=stack.x[some], ys=[stack.ys[0][some]]))
        assert torch.equal(part, whole[some])


def test_scores_of_a_float32_gate_are_those_of_float32(device) -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(130, 1030, generator=random).to(device, torch.bfloat16)
    gate = torch.randn(70, 1030, generator=random).to(device)
    expected = x.double() @ gate.double().T
    parts = _launch.score(x, gate)
    assert parts.shape == (2, 130, 70)
    assert_near(parts.sum(0), expected, torch.float32, scale=1030**0.5)


def test_grouped_units_serve_the_others(device) -> None:
    stack = make_stack(40, RANKS, d_out=(30, 12), rule=Rule("softmax", 2, null_score=0.2),
                       device=device)  # fmt: skip
    for m, units in enumerate(shrunk(stack)):
        own = stack.down.view(2, -1, 40)[m], stack.gate.view(2, -1, 40)[m]
        weights = reference.routed_weights(stack.x, own[1], stack.rule)
        z = reference.gated_units(stack.x, own[0], weights, stack.layout.columns)
        assert_near(grouped.ungrouped(units.z, units.places), z, torch.float32)
        for how in ("reference", "eager", "triton"):
            out = gated_expand(stack.ys[m], units, stack.ups[m], implementation=how)
            assert_near(out, stack.expected()[m], torch.float32)


APART = Layout(torch.tensor([0, 1, 0, 2, 2]), 3)


@pytest.mark.parametrize(
    "change",
    [
        {"rule": Rule()},
        {"rule": Rule("softmax", 3)},
        {"layout": APART},
    ],
    ids=["dense", "all", "apart"],
)
def test_what_does_not_fit_runs_on_the_other_kernels(change, device) -> None:
    stack = replace(make_stack(5, [2, 1, 2], rule=TOP2, device=device), **change)
    stack = replace(stack, layout=replace(stack.layout, columns=stack.layout.columns.to(device)))
    (units,) = routed_shrink(
        stack.x, stack.down, stack.gate, stack.layout, stack.rule, implementation="grouped"
    )
    assert not isinstance(units, Units) or units.places is None
    assert_near(stack.run("grouped")[0], stack.expected()[0], torch.float32)


def test_gradients_come_from_the_other_kernels(device) -> None:
    stack = make_stack(5, [2, 1, 2, 3], rule=TOP2, device=device).with_grad()
    (got,), (expected,) = stack.run("grouped"), stack.expected()
    ours = torch.autograd.grad(got.square().sum(), stack.leaves)
    theirs = torch.autograd.grad(expected.square().sum(), stack.leaves)
    for a, b in zip(ours, theirs, strict=True):
        assert_near(a, b, torch.float32, scale=100.0)
    with torch.no_grad():
        (units,) = shrunk(stack)
    out = gated_expand(stack.ys[0], units, stack.ups[0])  # units without, the expand with
    ups = torch.autograd.grad(out.square().sum(), stack.ups)
    assert_near(ups[0], theirs[-1], torch.float32, scale=100.0)


@pytest.mark.parametrize("broken", ["place", "expand"])
def test_a_failing_kernel_is_named_once_and_replaced(broken, device, monkeypatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("out of shared memory")

    dispatch.forget()
    monkeypatch.setattr(_launch_grouped, broken, fails)
    stack = make_stack(5, [2, 1, 2, 3], rule=TOP2, device=device)
    step = {"place": "grouped_shrink", "expand": "grouped_expand"}[broken]
    with pytest.warns(LoraMergeWarning, match=rf"{step} failed .*shared memory"):
        first = stack.run("grouped")[0]
    assert torch.equal(stack.run("grouped")[0], first)  # a second warning would be an error
    assert_near(first, stack.expected()[0], torch.float32)
    dispatch.forget()


GATES = {
    "meteora": {"top_k": 2, "null_expert": True},
    "arrow": {"top_k": 2},
    "smora": {"top_k": 3},
    "phatgoose": {"top_k": 1},
}


@pytest.mark.parametrize("gate", GATES)
def test_in_a_model(gate: str, device: str, monkeypatch, tmp_path: Path) -> None:
    model = llama(num_hidden_layers=1).to(device)
    shapes = shapes_of(model, "q_proj", "v_proj")
    paths = [
        str(save_adapter(tmp_path / f"{i}", r=2 + i, alpha=8, seed=i, shapes=shapes))
        for i in range(3)
    ]
    load_mixture(model, Mixture(paths, gate, **GATES[gate]))
    calls, place = [], _launch_grouped.place

    def counted(*arguments: object) -> object:
        calls.append(arguments)
        return place(*arguments)

    monkeypatch.setattr(_launch_grouped, "place", counted)
    outputs, ids = {}, tokens(2, 5).to(device)
    for how in ("eager", "grouped"):
        monkeypatch.setenv(dispatch.VARIABLE, how)
        with torch.no_grad():
            outputs[how] = model(input_ids=ids).logits
        assert bool(calls) == (how == "grouped" and gate != "phatgoose")  # which makes its own
    torch.testing.assert_close(outputs["grouped"], outputs["eager"], rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(_launch.INTERPRETED, reason="there are no CUDA graphs in the interpreter")
def test_in_a_cuda_graph(device) -> None:
    """Recorded once, replayed on other tokens, which take other experts."""
    stack = make_stack(300, [4] * 8, rule=TOP2, dtype=torch.bfloat16, gate_dtype=torch.float32,
                       device=device)  # fmt: skip
    other = stack.x.flip(0).contiguous()
    (expected,) = expanded(replace(stack, x=other))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expanded(stack)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (got,) = expanded(stack)
    stack.x.copy_(other)
    graph.replay()
    assert torch.equal(got, expected)


def test_the_layout_is_the_same_for_other_token_counts(device, monkeypatch, tmp_path) -> None:
    """Where the units stand is read from the device once, not at each new length of a prompt."""
    read = []
    known = Layout.segments.func

    def counted(layout: Layout) -> object:
        read.append(layout)
        return known(layout)

    monkeypatch.setattr(Layout, "segments", Layout.segments.__class__(counted))
    Layout.segments.__set_name__(Layout, "segments")
    model = llama(num_hidden_layers=1).to(device)
    shapes = shapes_of(model, "q_proj")
    paths = [
        str(save_adapter(tmp_path / f"{i}", r=2 + i, alpha=8, seed=i, shapes=shapes))
        for i in range(3)
    ]
    load_mixture(model, Mixture(paths, "arrow", top_k=2))
    monkeypatch.setenv(dispatch.VARIABLE, "grouped")
    with torch.no_grad():
        for length in (3, 5, 7):
            model(input_ids=tokens(1, length).to(device))
    assert len(read) == 1


def test_units_of_an_expert_are_found_where_they_stand(device) -> None:
    """In any order of the experts, some without a unit."""
    stack = make_stack(20, [2, 3, 1, 2], rule=TOP2, device=device)
    columns = owners([2, 3, 1, 2]).to(device)
    layout = Layout((5 - columns).clamp(0, 4), 6)  # of six: 4, 4, 4, 3, ... backwards
    layout = replace(layout, columns=torch.tensor([5, 5, 3, 3, 3, 0, 4, 4], device=device))
    random = torch.Generator().manual_seed(4)
    gate = torch.randn(6, stack.x.shape[1], generator=random).to(device)
    check(replace(stack, layout=layout, gate=gate))
