"""The gated stack on a GPU: which launches make up each step. Triton is imported at the first."""

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from lora_merge.kernels.gate_rule import Rule
from lora_merge.kernels.gated_stack.base_matrix import FEW_TOKENS
from lora_merge.kernels.gated_stack.layout import Layout, Ungated

HAS_TRITON = find_spec("triton") is not None


def refusal(device: torch.device, *dtypes: torch.dtype) -> str:
    """Why the kernels cannot run there; empty if they can."""
    if not HAS_TRITON:
        return "triton is not installed"
    from lora_merge.kernels.gated_stack.gpu import _launch

    for dtype in dtypes:
        if dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"no kernel for {dtype}"
    if len(set(dtypes)) > 1:
        return f"no kernel for {' and '.join(str(d) for d in dtypes)} together"
    if _launch.INTERPRETED:
        return "" if device.type == "cpu" else f"triton's interpreter does not run on {device.type}"
    if device.type != "cuda":
        return f"no kernel for {device.type}"
    return _generation(device)


@cache
def _generation(device: torch.device) -> str:
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "no kernel for a GPU before compute capability 8.0"
    return ""


def gated_shrink(
    x: Tensor, down: Tensor, weights: Tensor, columns: Tensor, members: int, keep_u: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Shrink, and weigh by given weights.

    Args:
        x: Shape (T, d_in).
        down: Shape (M R, d_in).
        weights: Shape (T', M C), T' dividing T.
        columns: Weight of each unit of one member, int64, shape (R,).
        members: M.
        keep_u: Whether the units before the gate are wanted.

    Returns:
        z, shape (T, M R); words, int32, shape (T, M ceil(R / 32)); the units before the gate, shape
        (T, M R), or (0,).
    """
    from lora_merge.kernels.gated_stack.gpu import _launch

    layout = Layout(columns, weights.shape[1] // members, members=members)
    parts, _ = _shrink(x, down, None)
    return _launch.gate(parts, _rows(weights)[None], layout, x.dtype, keep_u=keep_u)


def routed_shrink(
    x: Tensor, down: Tensor, gate: Tensor, bias: Tensor | None, layout: Layout, rule: Rule
) -> tuple[Tensor, Tensor]:
    """Shrink to units and scores, and weigh by the scores.

    Args:
        x: Shape (T, d_in).
        down: Shape (M R, d_in).
        gate: Rows whose products with a token are its scores, shape (M n, d_in).
        bias: Shape (M n,), or None.
        layout: Units and weights.
        rule: How scores become weights.

    Returns:
        z, shape (T, M R); words, int32, shape (T, M ceil(R / 32)).
    """
    from lora_merge.kernels.gated_stack.gpu import _launch

    bias = None if bias is None else bias.contiguous()
    parts, scores = _shrink(x, down, gate)
    z, words, _ = _launch.gate(parts, scores, layout, x.dtype, rule=rule, bias=bias)
    return z, words


def shrink(
    x: Tensor,
    down: Tensor,
    scores: Tensor,
    layout: Layout,
    rule: Rule | None = None,
    bias: Tensor | None = None,
) -> list[Ungated]:
    """Shrink a few tokens, and leave the gate to `gate_expand`.

    Args:
        x: Shape (T, d_in).
        down: Shape (M R, d_in).
        scores: Rows whose products with a token are its scores, shape (M n, d_in); without a rule
            the weights, shape (T', M C), T' dividing T.
        layout: Units and weights.
        rule: How scores become weights.
        bias: Shape (M n,), or None.
    """
    parts, pieces = _shrink(x, down, None if rule is None else scores)
    pieces = _rows(scores)[None] if rule is None else pieces
    bias = None if bias is None else bias.contiguous()
    return Ungated(parts, pieces, layout.columns, x.dtype, rule, bias).members(layout.members)


def gate_expand(y: Tensor, units: Ungated, up: Tensor) -> Tensor:
    """Y + (g u) up for a few tokens, into new memory.

    Args:
        y: Shape (T, d_out), of any floating dtype.
        units: Before their gate, shape (T, R).
        up: Shape (R, d_out).

    Returns:
        Shape (T, d_out), in the dtype of `y`.
    """
    from lora_merge.kernels.gated_stack.gpu import _launch

    width = y.shape[1]
    tiles = _launch.gate_expand_tiles(y.shape[0], width, up.element_size())
    out = _launch.gate_expand(
        _rows(y), units.parts, units.scores, up.contiguous(), (width,), units.columns, tiles,
        y.dtype, rule=units.rule, bias=units.bias,
    )  # fmt: skip
    return out.view(y.shape)


def holds(tokens: int, weights: int) -> bool:
    """Whether a program can hold all the weights of its tokens, so that `gate_expand` runs."""
    return tokens == 1 or (tokens <= FEW_TOKENS and weights <= 128)


def expand(y: Tensor, z: Tensor, up: Tensor, words: Tensor | None) -> Tensor:
    """Y + z up, into new memory.

    Args:
        y: Shape (T, d_out).
        z: Shape (T, R).
        up: Shape (R, d_out).
        words: Shape (T, ceil(R / 32)); None to read every row of `up`.

    Returns:
        Shape (T, d_out).
    """
    from lora_merge.kernels.gated_stack.gpu import _launch

    if not y.numel() or not up.shape[0]:
        return y.clone()
    tiles = _launch.expand_tiles(y.shape[0], y.shape[1])
    return _launch.expand(_rows(y), _rows(z), up.contiguous(), words, tiles)


def _shrink(x: Tensor, down: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor]:
    from lora_merge.kernels.gated_stack.gpu import _launch

    num_rows = down.shape[0] + (0 if gate is None else gate.shape[0])
    tokens, width = x.shape
    processors, size = _launch.processors(x.device), x.element_size()
    tiles = _launch.shrink_tiles(tokens, width, num_rows, processors, size)
    gate = None if gate is None else gate.contiguous()
    return _launch.shrink(_rows(x), down.contiguous(), gate, tiles)


def _rows(x: Tensor) -> Tensor:
    """The tensor, copied unless its rows are contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
