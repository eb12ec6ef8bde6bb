"""The public steps without any GPU or Triton: eager and the reference, and what is refused."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.stacks import assert_near, make_stack
from lora_merge.errors import MethodError
from lora_merge.kernels.gate_rule import Rule
from lora_merge.kernels.gated_stack import reference
from lora_merge.kernels.gated_stack.operation import (
    gated_expand,
    gated_shrink,
    gated_stack,
    routed_shrink,
)

values = st.sampled_from(["softmax", "softmax_all", "softmax_twice", "sigmoid", "raw", "binary"])


@given(
    st.integers(0, 5),
    st.lists(st.integers(1, 4), min_size=1, max_size=5),
    st.builds(
        Rule,
        values,
        st.none() | st.integers(1, 6),
        st.sampled_from([0.5, 1.0]),
        st.sampled_from([1.0, 3.0]),
        st.booleans(),
        st.booleans(),
        st.none(),
    ),
    st.booleans(),
)
def test_eager_is_the_specification(tokens: int, ranks: list[int], rule: Rule, bias: bool) -> None:
    stack = make_stack(tokens, ranks, d_out=(6, 4), rule=rule, bias=bias)
    for got, expected in zip(stack.run("eager"), stack.expected(), strict=True):
        assert_near(got, expected, torch.float32)


@given(st.integers(1, 4), st.sampled_from([Rule(), Rule("softmax", 2, null_score=0.4)]))
def test_the_reference_is_an_implementation(tokens: int, rule: Rule) -> None:
    stack = make_stack(tokens, [2, 1, 3], d_out=(6, 4), rule=rule)
    for got, expected in zip(stack.run("reference"), stack.expected(), strict=True):
        assert_near(got, expected, torch.float32)


def test_one_call_is_the_three_steps() -> None:
    stack = make_stack(4, [2, 3])
    weights = torch.rand(4, 2)
    columns = stack.layout.columns
    arguments = (stack.x, stack.ys[0], stack.down, stack.ups[0], weights, columns)
    assert_near(gated_stack(*arguments), reference.gated_stack(*arguments), torch.float32)


def test_eager_gradients() -> None:
    stack = make_stack(4, [2, 3], rule=Rule("softmax", 1, factor=2.0)).with_grad()
    (got,), (expected,) = stack.run("eager"), stack.expected()
    ours = torch.autograd.grad(got.square().sum(), stack.leaves)
    theirs = torch.autograd.grad(expected.square().sum(), stack.leaves)
    for a, b in zip(ours, theirs, strict=True):
        assert_near(a, b, torch.float32, scale=100.0)


def test_what_does_not_fit_is_refused() -> None:
    stack = make_stack(4, [2, 3])
    weights = torch.rand(4, 2)
    with pytest.raises(MethodError, match=r"down has shape \(4, 40\), expected \(5, 40\)"):
        gated_shrink(stack.x, stack.down[:4], weights, stack.layout)
    with pytest.raises(MethodError, match="weights has shape"):
        gated_shrink(stack.x, stack.down, weights[:, :1], stack.layout)
    with pytest.raises(MethodError, match="3 rows and 4 tokens"):
        gated_shrink(stack.x, stack.down, weights[:3], stack.layout)
    with pytest.raises(MethodError, match="gate has shape"):
        routed_shrink(stack.x, stack.down, stack.gate[:1], stack.layout, Rule())
    with pytest.raises(MethodError, match=r"float64 .*float32"):
        gated_shrink(stack.x.double(), stack.down, weights, stack.layout)
    (units,) = gated_shrink(stack.x, stack.down, weights, stack.layout)
    with pytest.raises(MethodError, match="up has shape"):
        gated_expand(stack.ys[0][:, :5], units, stack.ups[0])
    with pytest.raises(MethodError, match="no implementation 'fast'"):
        gated_shrink(stack.x, stack.down, weights, stack.layout, implementation="fast")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_triton_by_name_without_a_gpu_is_refused() -> None:
    stack = make_stack(4, [2, 3])
    with pytest.raises(MethodError, match=r"triton is not installed|no kernel for cpu"):
        stack.run("triton")


def test_importing_the_room_does_not_import_triton() -> None:
    code = """
import sys
import lora_merge.kernels.gated_stack, lora_merge.mixture
assert not any(name.split(".")[0] == "triton" for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
