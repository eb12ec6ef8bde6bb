"""The whole gated stack on Triton kernels, forward and backward, against the specification."""

import pytest
import torch

from kernels.stacks import Stack, assert_near, make_stack
from lora_merge.errors import LoraMergeWarning, MethodError
from lora_merge.kernels.gate_rule import Rule
from lora_merge.kernels.gated_stack import reference
from lora_merge.kernels.gated_stack.gpu import fused, library
from lora_merge.kernels.gated_stack.layout import Units
from lora_merge.kernels.gated_stack.operation import gated_expand, gated_shrink, routed_shrink

TOP2 = Rule("softmax", 2)


def check(stack: Stack, dtype: torch.dtype = torch.float32) -> None:
    for got, expected in zip(stack.run("triton"), stack.expected(), strict=True):
        assert got.dtype == dtype
        assert_near(got, expected, dtype)


HALF = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize(
    ("tokens", "dtype"),
    [(t, torch.float32) for t in (1, 2, 15, 16, 17)] + [(t, d) for t in (1, 17) for d in HALF],
)
def test_forward(tokens, dtype, device) -> None:
    """Uneven ranks, widths that fit no tile, two members."""
    check(make_stack(tokens, [3, 9, 1, 20], d_in=77, d_out=(45, 19), rule=TOP2, dtype=dtype,
                     device=device), dtype)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 70])
def test_a_gate_in_float32_beside_half_factors(tokens, dtype, device) -> None:
    stack = make_stack(tokens, [3, 2, 4], rule=TOP2, dtype=dtype, gate_dtype=torch.float32,
                       device=device)  # fmt: skip
    check(stack, dtype)


@pytest.mark.parametrize("tokens", [255, 256, 257])
def test_many_tokens(tokens, device) -> None:
    check(make_stack(tokens, [2, 2], d_in=17, d_out=(9,), rule=Rule("softmax", 1), device=device))


@pytest.mark.parametrize("ranks", [[1], [2, 3], [16] * 4, [64] * 5, [8] * 256], ids=len)
def test_ranks_from_one_to_two_thousand(ranks, device) -> None:
    check(make_stack(3, ranks, d_out=(20,), rule=TOP2, device=device))


RULES = {
    "dense": Rule(),
    "xlora": Rule("softmax_all", 2),
    "twice": Rule("softmax_twice", 3, temperature=0.7),
    "sigmoid": Rule("sigmoid", 2, factor=2.0),
    "raw": Rule("raw"),
    "arrow": Rule("softmax", 2, absolute=True, null_score=0.3),
    "null": Rule("softmax", 2, null_row=True),
}


@pytest.mark.parametrize("name", RULES)
def test_gradients(name, device) -> None:
    """Of x, both factors, the gate rows and the base's output, for every kind of gate."""
    stack = make_stack(6, [2, 5, 1, 3], d_out=(12, 7), rule=RULES[name], device=device).with_grad()
    random = torch.Generator().manual_seed(9)
    pulls = [torch.randn(y.shape, generator=random).to(device) for y in stack.ys]

    def gradients(outputs: list[torch.Tensor]) -> list[torch.Tensor]:
        total = sum((o * p.to(o.dtype)).sum() for o, p in zip(outputs, pulls, strict=True))
        return torch.autograd.grad(total, stack.leaves)

    for got, expected in zip(
        gradients(stack.run("triton")), gradients(stack.expected()), strict=True
    ):
        assert_near(got, expected, torch.float32, scale=10.0)


@pytest.mark.parametrize("rows", [1, 2, 6])
def test_gradients_of_given_weights(rows, device) -> None:
    """A row of weights may serve one token, a sequence or everything."""
    stack = make_stack(6, [2, 5, 1], device=device).with_grad()
    random = torch.Generator().manual_seed(3)
    weights = torch.randn(rows, 3, generator=random).to(device).requires_grad_(True)
    leaves = [stack.x, stack.down, stack.ups[0], weights]
    (units,) = gated_shrink(stack.x, stack.down, weights, stack.layout, implementation="triton")
    got = gated_expand(stack.ys[0], units, stack.ups[0], implementation="triton")
    expected = reference.gated_stack(
        stack.x, stack.ys[0], stack.down, stack.ups[0], weights, stack.layout.columns
    )
    assert_near(got, expected, torch.float32)
    ours = torch.autograd.grad(got.square().sum(), leaves)
    theirs = torch.autograd.grad(expected.square().sum(), leaves)
    for a, b in zip(ours, theirs, strict=True):
        assert_near(a, b, torch.float32, scale=100.0)


@pytest.mark.parametrize("leaf", ["up", "y"])
def test_gradients_of_what_the_shrink_does_not_see(leaf, device) -> None:
    """Experts may be trained on one side alone, on few tokens."""
    stack = make_stack(4, [2, 5], device=device)
    y, up = stack.ys[0].clone(), stack.ups[0].clone()
    learned = (up if leaf == "up" else y).requires_grad_(True)
    gradients = []
    for how in ("triton", "eager"):
        (units,) = routed_shrink(
            stack.x, stack.down, stack.gate, stack.layout, stack.rule, implementation=how
        )
        out = gated_expand(y, units, up)
        gradients += torch.autograd.grad(out.square().sum(), [learned])
    assert_near(gradients[0], gradients[1], torch.float32, scale=100.0)


def test_training_a_gate_keeps_units_and_weights_alone(device) -> None:
    """T (R + C) entries beside x, however wide the module is."""
    tokens, ranks = 8, [4] * 8
    stack = make_stack(tokens, ranks, d_in=64, d_out=(96,), device=device)
    weights = torch.rand(tokens, 8, device=device, requires_grad=True)
    kept: dict[int, int] = {}
    known = {t.untyped_storage().data_ptr() for t in (stack.x, stack.down, stack.ups[0])}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in known and tensor.is_floating_point():
            kept[place] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        (units,) = gated_shrink(stack.x, stack.down, weights, stack.layout, implementation="triton")
        gated_expand(stack.ys[0], units, stack.ups[0], implementation="triton")
    assert sum(kept.values()) == tokens * (sum(ranks) + len(ranks))


def test_tokens_in_any_strides(device) -> None:
    stack = make_stack(6, [3, 4], d_in=40, device=device)
    expected = stack.expected()[0]
    apart = torch.full((40, 12), torch.nan, device=device)
    apart[:, ::2] = stack.x.T
    for x in (apart[:, ::2].T, stack.x.view(2, 3, 40), stack.x.T.contiguous().T):
        (units,) = routed_shrink(
            x, stack.down, stack.gate, stack.layout, stack.rule, implementation="triton"
        )
        wide = torch.zeros(6, 70, device=device)
        wide[:, 20:50] = stack.ys[0]
        out = gated_expand(wide[:, 20:50], units, stack.ups[0], implementation="triton")
        assert_near(out, expected, torch.float32)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of what is asked for here
def test_nan_stays_in_its_row(device) -> None:
    stack = make_stack(20, [3] * 4, d_in=50, rule=TOP2, device=device)
    stack.x[7, 3] = torch.nan
    stack.x[11, 0] = torch.inf
    rows = stack.run("triton")[0].isfinite().all(1)
    assert (~rows).nonzero().flatten().tolist() == [7, 11]
    assert stack.run("triton")[0][7].isnan().all()
    clean = [t for t in range(20) if t not in (7, 11)]
    stack.x[7], stack.x[11] = 0, 0
    got, expected = stack.run("triton")[0][clean], stack.expected()[0][clean]
    assert_near(got, expected, torch.float32)


def test_nothing_to_do(device) -> None:
    for tokens, ranks in ((0, [2, 3]), (4, [])):
        stack = make_stack(tokens, ranks, device=device)
        weights = torch.zeros(tokens, len(ranks), device=device)
        (units,) = gated_shrink(stack.x, stack.down, weights, stack.layout, implementation="triton")
        out = gated_expand(stack.ys[0], units, stack.ups[0], implementation="triton")
        assert torch.equal(out, stack.ys[0])
    for tokens in (1, 4, 20):
        stack = make_stack(tokens, [2, 3], device=device)
        zero = torch.zeros(1, 2, device=device)
        (units,) = gated_shrink(stack.x, stack.down, zero, stack.layout, implementation="triton")
        bad = torch.full_like(stack.ups[0], torch.nan)
        out = gated_expand(stack.ys[0], units, bad, implementation="triton")
        assert torch.equal(out, stack.ys[0])


def test_the_same_bits_every_time(device) -> None:
    stack = make_stack(9, [5] * 7, d_in=300, rule=TOP2, device=device)
    first = stack.run("triton")[0]
    assert all(torch.equal(stack.run("triton")[0], first) for _ in range(3))


def test_what_a_kernel_cannot_take_is_refused(device) -> None:
    stack = make_stack(3, [2, 2], device=device)
    double = make_stack(3, [2, 2], device=device).x.double()
    with pytest.raises(MethodError, match="float64"):
        routed_shrink(
            double,
            stack.down.double(),
            stack.gate,
            stack.layout,
            stack.rule,
            implementation="triton",
        )
    for tokens in (3, 20):
        some = make_stack(tokens, [2, 2], device=device)
        (units,) = routed_shrink(
            some.x, some.down, some.gate, some.layout, some.rule, implementation="triton"
        )
        with pytest.raises(MethodError, match="tokens are"):
            gated_expand(some.ys[0], units, some.ups[0].half())
    with pytest.raises(MethodError, match="tokens are"):
        routed_shrink(
            stack.x,
            stack.down.half(),
            stack.gate,
            stack.layout,
            stack.rule,
            implementation="triton",
        )


def test_operators_say_the_truth_about_themselves(device) -> None:
    """Schema, fake shapes and registered gradients, by torch's own check."""
    stack = make_stack(3, [2, 3], d_in=8, d_out=(5,), device=device).with_grad()
    weights = torch.rand(3, 2, device=device, requires_grad=True)
    arguments = (stack.x, stack.down, weights, stack.layout.columns, 1, True)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(library.gated_shrink, arguments, test_utils=checks)
    z, words, _ = fused.gated_shrink(
        *(a.detach() if hasattr(a, "detach") else a for a in arguments)
    )
    expand = (stack.ys[0], z.requires_grad_(True), stack.ups[0], words)
    torch.library.opcheck(library.gated_expand, expand, test_utils=checks)
    numbers = [1.0, 1.0]
    inputs = [t.detach() for t in (stack.x, stack.down, stack.gate)]
    rest = (stack.layout.columns, None, 2, 1, "softmax", 1, numbers, False, False)
    routed = (*inputs, *rest)
    torch.library.opcheck(library._routed_shrink, routed, test_utils=checks)


@pytest.mark.parametrize("training", [False, True])
def test_compiles_without_a_graph_break(training, device) -> None:
    stack = make_stack(5, [2, 3, 1], rule=TOP2, device=device)
    down, gate = stack.down.requires_grad_(training), stack.gate.requires_grad_(training)

    def run(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        (units,) = routed_shrink(x, down, gate, stack.layout, stack.rule, implementation="triton")
        return gated_expand(y, units, stack.ups[0], implementation="triton")

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(training):
        got, expected = compiled(stack.x, stack.ys[0]), stack.expected()[0]
        assert_near(got.detach(), expected.detach(), torch.float32)
        if training:
            ours = torch.autograd.grad(got.square().sum(), [down, gate])
            theirs = torch.autograd.grad(run(stack.x, stack.ys[0]).square().sum(), [down, gate])
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_failing_kernel_is_named_once_and_replaced(device, monkeypatch) -> None:
    from lora_merge.kernels.gated_stack import dispatch
    from lora_merge.kernels.gated_stack.gpu import _launch

    dispatch.forget()

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("out of shared memory")

    for name, step, tokens in (
        ("gate", "routed_shrink", 20),
        ("gate_expand", "gate_expand", 4),
        ("shrink", "routed_shrink", 4),
    ):
        stack = make_stack(tokens, [2, 3], device=device)
        with monkeypatch.context() as patch:
            patch.setattr(_launch, name, broken)
            with pytest.warns(LoraMergeWarning, match=f"{step} failed .*shared memory"):
                first = stack.run("triton")[0]
            again = stack.run("triton")[0]  # a second warning would be an error
        assert_near(first, stack.expected()[0], torch.float32)
        assert torch.equal(first, again)
        dispatch.forget()


def test_units_of_eager_can_be_expanded_by_a_kernel(device) -> None:
    stack = make_stack(4, [2, 3], device=device)
    (units,) = routed_shrink(
        stack.x, stack.down, stack.gate, stack.layout, stack.rule, implementation="eager"
    )
    out = gated_expand(stack.ys[0], Units(units.z), stack.ups[0], implementation="triton")
    assert_near(out, stack.expected()[0], torch.float32)
