"""The fused steps as operators that autograd and torch.compile(fullgraph=True) know."""

from typing import cast

import torch
from torch import Tensor

from lora_merge.kernels.gate_rule import Rule, Value
from lora_merge.kernels.gated_stack.gpu import fused
from lora_merge.kernels.gated_stack.gpu.autograd import (
    expand_backward,
    keep_expand,
    keep_shrink,
    shrink_backward,
)
from lora_merge.kernels.gated_stack.layout import WORD, Layout

gated_shrink = torch.library.custom_op(
    "lora_merge::gated_shrink", fused.gated_shrink, mutates_args=()
)
gated_expand = torch.library.custom_op("lora_merge::gated_expand", fused.expand, mutates_args=())


@torch.library.custom_op("lora_merge::routed_shrink", mutates_args=())
def _routed_shrink(
    x: Tensor,
    down: Tensor,
    gate: Tensor,
    columns: Tensor,
    bias: Tensor | None,
    num_weights: int,
    members: int,
    value: str,
    top_k: int | None,
    numbers: list[float],
    absolute: bool,
    null_row: bool,
) -> tuple[Tensor, Tensor]:
    """`fused.routed_shrink`, its layout and rule taken apart: operators know only plain types."""
    temperature, factor, *null = numbers
    rule = Rule(cast(Value, value), top_k, temperature, factor, absolute, null_row, *null)
    layout = Layout(columns, num_weights, members=members)
    return fused.routed_shrink(x, down, gate, bias, layout, rule)


def routed_shrink(
    x: Tensor, down: Tensor, gate: Tensor, bias: Tensor | None, layout: Layout, rule: Rule
) -> tuple[Tensor, Tensor]:
    """`fused.routed_shrink` as an operator."""
    numbers = [rule.temperature, rule.factor]
    numbers += [] if rule.null_score is None else [rule.null_score]
    z, words = _routed_shrink(
        x, down, gate, layout.columns, bias, layout.num_weights, layout.members,
        rule.value, rule.top_k, numbers, rule.absolute, rule.null_row,
    )  # fmt: skip
    return z, words


def _units_like(x: Tensor, columns: Tensor, members: int) -> tuple[Tensor, Tensor]:
    tokens, units = x.shape[0], columns.shape[0]
    words = -(-units // WORD)
    return (
        x.new_empty(tokens, members * units),
        x.new_empty(tokens, members * words, dtype=torch.int32),
    )


@gated_shrink.register_fake
def _(
    x: Tensor, down: Tensor, weights: Tensor, columns: Tensor, members: int, keep_u: bool
) -> tuple[Tensor, Tensor, Tensor]:
    z, words = _units_like(x, columns, members)
    return z, words, torch.empty_like(z) if keep_u else x.new_empty(0)


@_routed_shrink.register_fake
def _(
    x: Tensor,
    down: Tensor,
    gate: Tensor,
    columns: Tensor,
    bias: Tensor | None,
    num_weights: int,
    members: int,
    value: str,
    top_k: int | None,
    numbers: list[float],
    absolute: bool,
    null_row: bool,
) -> tuple[Tensor, Tensor]:
    return _units_like(x, columns, members)


@gated_expand.register_fake
def _(y: Tensor, z: Tensor, up: Tensor, words: Tensor | None) -> Tensor:
    return y.new_empty(y.shape)


gated_shrink.register_autograd(shrink_backward, setup_context=keep_shrink)
gated_expand.register_autograd(expand_backward, setup_context=keep_expand)
