"""The gated stack in three steps, each on whichever implementation is fastest.

units = routed_shrink(x, down, gate, layout, rule)  or  gated_shrink(x, down, weights, layout)
y = gated_expand(y, units[m], up_m)                for every module m that shares the input
"""

import torch
from torch import Tensor

from lora_merge.errors import MethodError
from lora_merge.kernels.gate_rule import Rule
from lora_merge.kernels.gated_stack import dispatch, eager, reference
from lora_merge.kernels.gated_stack.dispatch import Name, case_of, guarded
from lora_merge.kernels.gated_stack.gate import weights_of
from lora_merge.kernels.gated_stack.gpu import fused, grouped, library
from lora_merge.kernels.gated_stack.layout import (
    Layout,
    Places,
    Shrunk,
    Ungated,
    Units,
    split_members,
)


def gated_shrink(
    x: Tensor, down: Tensor, weights: Tensor, layout: Layout, *, implementation: str | None = None
) -> list[Shrunk]:
    """Shrink tokens to units, and multiply each unit by its given weight.

    Args:
        x: Tokens, shape (..., d_in), T of them; any strides.
        down: Rows of every A of every member, shape (M R, d_in), in the dtype of `x`.
        weights: Shape (T', M C), floating; T' divides T, and a row serves T / T' tokens in a row.
        layout: M, R, C, and which unit takes which weight.
        implementation: "reference", "eager" or "triton"; default: what the dispatch table says.

    Returns:
        What `gated_expand` takes, of each member. Differentiable in x, down and weights.

    Raises:
        MethodError: If shapes, dtypes or devices do not fit, or the implementation cannot run.
    """
    flat = x.reshape(-1, x.shape[-1])
    units, count = layout.widths
    _same("down", down.shape, (units, flat.shape[1]))
    _same("weights", weights.shape[1:], (count,))
    if len(flat) % max(1, len(weights)) or (len(flat) and not len(weights)):
        raise MethodError(
            f"gated stack: weights for {len(weights)} rows and {len(flat)} tokens",
            "one row per token, per sequence, or one for all",
        )
    _together(flat, down)

    def plain() -> list[Shrunk]:
        u = eager.shrink_linear(flat, down)
        columns = layout.joined if layout.block is None else None
        z = eager.gate_units(u, weights, layout.block, columns)
        return split_members(z, None, layout, "eager")

    def fast() -> list[Shrunk]:
        operator = _as_operator(flat, down, weights)
        if not operator and fused.holds(len(flat), layout.num_weights):
            return [*fused.shrink(flat, down, weights, layout)]
        keep = torch.is_grad_enabled() and weights.requires_grad
        arguments = flat, down, weights, layout.columns, layout.members, keep
        run = library.gated_shrink if operator else fused.gated_shrink
        z, words, _ = run(*arguments)
        return split_members(z, words, layout, "triton")

    name = implementation or chosen(flat, down, layout, "given")
    if name == "reference":
        z = reference.gated_units(flat, down, weights, layout.joined).to(flat.dtype)
        return split_members(z, None, layout, "reference")
    if not _runs_fused(name, flat, down, units):
        return plain()
    return guarded("gated_shrink", fast, plain)


def routed_shrink(
    x: Tensor,
    down: Tensor,
    gate: Tensor,
    layout: Layout,
    rule: Rule,
    *,
    bias: Tensor | None = None,
    implementation: str | None = None,
) -> list[Shrunk]:
    """Shrink tokens to units and scores at once, and weigh the units by their scores.

    Args:
        x: Tokens, shape (..., d_in), T of them; any strides.
        down: Rows of every A of every member, shape (M R, d_in), in the dtype of `x`.
        gate: Rows of every member whose products with a token are its scores, shape (M n, d_in), of
            any floating dtype; n = C, or C + 1 with a learned null expert.
        layout: M, R, C, and which unit takes which weight.
        rule: How scores become weights.
        bias: Added to the scores for the selection alone, shape (M n,).
        implementation: "reference", "eager", "triton" or "grouped", which is "triton" with a
            gradient and for gates that keep most experts; default: what the dispatch table says.

    Returns:
        What `gated_expand` takes, of each member. Differentiable in x, down and gate.

    Raises:
        MethodError: If shapes, dtypes or devices do not fit, or the implementation cannot run.
    """
    flat = x.reshape(-1, x.shape[-1])
    units, count = layout.widths
    scores = count + layout.members * rule.null_row
    _same("down", down.shape, (units, flat.shape[1]))
    _same("gate", gate.shape, (scores, flat.shape[1]))
    if bias is not None:
        _same("bias", bias.shape, (scores,))
    _together(flat, down)
    sparse = rule.is_sparse
    kind: dispatch.GateKind = "top-k" if sparse else "dense"
    name = implementation or chosen(flat, down, layout, kind, rule.top_k)
    each = None if bias is None else bias.view(layout.members, -1)

    def weights() -> Tensor:
        raw = eager.shrink_linear(flat.to(gate.dtype), gate).unflatten(1, (layout.members, -1))
        return weights_of(raw, rule, each).flatten(1)

    def composed(name: str) -> list[Shrunk]:
        return gated_shrink(flat, down, weights(), layout, implementation=name)

    if name == "grouped" and (_as_operator(flat, down, gate) or not grouped.fits(layout, rule)):
        name = "triton"

    def fast() -> list[Shrunk]:
        if torch.is_grad_enabled() and any(t.requires_grad for t in (flat, down, gate)):
            return composed("triton")  # the gate's own gradient is small, and autograd's
        arguments = flat, down, gate, bias, layout, rule
        if name == "grouped":
            return [*grouped.routed_shrink(*arguments)]
        if not _as_operator() and fused.holds(len(flat), len(gate) // layout.members + 1):
            return [*fused.shrink(flat, down, gate, layout, rule, bias)]
        if _as_operator():
            z, words = library.routed_shrink(*arguments)
        else:
            z, words = fused.routed_shrink(*arguments)
        return split_members(z, words if sparse else None, layout, "triton")

    if name == "reference":
        parts = gate.view(layout.members, -1, gate.shape[1])
        own = [None] * layout.members if each is None else list(each)
        made = [reference.routed_weights(flat, g, rule, b) for g, b in zip(parts, own, strict=True)]
        return gated_shrink(flat, down, torch.cat(made, 1), layout, implementation=name)
    if not _runs_fused(name, flat, down, units):
        return composed("eager")
    step = "grouped_shrink" if name == "grouped" else "routed_shrink"
    return guarded(step, fast, lambda: composed("eager"))


def gated_expand(
    y: Tensor, units: Shrunk, up: Tensor, *, implementation: str | None = None
) -> Tensor:
    """Add the gated units' outputs to the base module's.

    Args:
        y: Output of the base module, shape (..., d_out), T tokens.
        units: From a shrink of the same tokens, R of them.
        up: Rows of every B^T with the scaling folded in, shape (R, d_out).
        implementation: As for the shrink; default: what made the units.

    Returns:
        Shape and dtype of `y`; `y` itself is left as it is. Differentiable in y, the units and up.

    Raises:
        MethodError: If shapes, dtypes or devices do not fit, or the implementation cannot run.
    """
    flat = y.reshape(-1, y.shape[-1])
    if isinstance(units, Ungated):
        kernel = implementation in (None, "triton", "grouped") and y.is_floating_point()
        if kernel and not _as_operator(flat, up):
            return _gate_and_expand(flat, units, up).view(y.shape)
        units = gate_now(units)
    if units.places is not None:
        return _expand_grouped(y, flat, units.z, up, units.places, implementation)
    z, words = units.z, units.words
    _same("up", up.shape, (z.shape[1], flat.shape[1]))
    _same("z", z.shape, (len(flat), z.shape[1]))
    _together(z, up)

    def plain() -> Tensor:
        return eager.expand(y, z, up)

    def fast() -> Tensor:
        if _as_operator(flat, z, up):
            out: Tensor = library.gated_expand(flat, z, up, words)
        else:
            out = fused.expand(flat, z, up, words)
        return out.view(y.shape)

    name = implementation or units.implementation
    if name == "reference":
        return reference.expand(flat, z, up).to(y.dtype).view(y.shape)
    if not _runs_fused(name, z, up, z.shape[1]) or not y.is_floating_point():
        return plain()
    return guarded("gated_expand", fast, plain)


def gate_now(units: Ungated) -> Units:
    """Gate units in plain PyTorch that were to be gated with the expand."""
    scores = units.scores.sum(0)
    weights = scores if units.rule is None else weights_of(scores, units.rule, units.bias)
    u = units.parts.sum(0)
    return Units(eager.gate_units(u, weights, None, units.columns).to(units.dtype))


def _gate_and_expand(flat: Tensor, units: Ungated, up: Tensor) -> Tensor:
    _same("up", up.shape, (units.parts.shape[2], flat.shape[1]))
    _same("units", units.parts.shape[1:2], flat.shape[:1])
    _together(units.parts, up, units.dtype)  # sums of products are float32
    return guarded(
        "gate_expand",
        lambda: fused.gate_expand(flat, units, up),
        lambda: eager.expand(flat, gate_now(units).z, up),
    )


def _expand_grouped(
    y: Tensor, flat: Tensor, z: Tensor, up: Tensor, places: Places, implementation: str | None
) -> Tensor:
    """The same for units that are grouped by expert; others are made of them if need be."""
    _same("up", up.shape, (places.num_units, flat.shape[1]))
    _same("weights", places.weights.shape, (places.weights.shape[0], len(flat)))
    _together(z, up)

    def other(name: str) -> Tensor:
        return gated_expand(y, Units(grouped.ungrouped(z, places), None, name), up)

    if implementation not in (None, "grouped") or not y.is_floating_point():
        return other(implementation or "eager")
    if _as_operator(flat, up):
        return other("triton")
    fast = lambda: grouped.expand(flat, z, up, places).view(y.shape)  # noqa: E731
    return guarded("grouped_expand", fast, lambda: other("eager"))


def gated_stack(
    x: Tensor,
    y: Tensor,
    down: Tensor,
    up: Tensor,
    weights: Tensor,
    columns: Tensor,
    *,
    implementation: str | None = None,
) -> Tensor:
    """Y + up^T (g * (down x)) for one module, all at once; shapes as in the three steps.

    Raises:
        MethodError: If shapes, dtypes or devices do not fit, or the implementation cannot run.
    """
    layout = Layout(columns, weights.shape[1])
    (units,) = gated_shrink(x, down, weights, layout, implementation=implementation)
    return gated_expand(y, units, up, implementation=implementation)


def chosen(
    x: Tensor, down: Tensor, layout: Layout, gate: dispatch.GateKind, kept: int | None = None
) -> Name:
    """The implementation that the dispatch table, or the user, wants for a call that keeps k."""
    if torch.compiler.is_compiling():  # for all token counts at once, so no row of the table
        return "triton" if dispatch.forced() in ("triton", "grouped") else "eager"
    able: list[Name] = ["eager", "reference"]
    if not fused.refusal(x.device, x.dtype, down.dtype):
        able += ["triton", "grouped"] if gate == "top-k" else ["triton"]
    experts, kept = layout.num_weights, kept if gate == "top-k" else None
    case = case_of(x, layout.outputs, layout.widths[0], down.dtype, gate, experts, kept)
    return dispatch.choose(case, able)


def _runs_fused(name: str, x: Tensor, factor: Tensor, units: int) -> bool:
    """Whether a kernel runs; an empty product needs none.

    Raises:
        MethodError: If it was asked for by name and cannot.
    """
    if name not in dispatch.NAMES:
        raise MethodError(f"no implementation {name!r}", f"one of {', '.join(dispatch.NAMES)}")
    if name not in ("triton", "grouped") or not len(x) or not units or not x.shape[1]:
        return False
    if torch.compiler.is_compiling():
        return True
    reason = fused.refusal(x.device, x.dtype, factor.dtype)
    if reason:
        raise MethodError(f"gated stack: {reason}", "leave the choice of implementation to auto")
    return True


def _as_operator(*inputs: Tensor) -> bool:
    """Whether a call must be an operator: to be compiled, or to have a gradient."""
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    return grad or torch.compiler.is_compiling()


def _same(what: str, got: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if tuple(got) != expected:
        raise MethodError(
            f"gated stack: {what} has shape {tuple(got)}, expected {expected}",
            "check which stack belongs to which module",
        )


def _together(x: Tensor, factor: Tensor, dtype: torch.dtype | None = None) -> None:
    dtype = dtype or x.dtype
    if x.device != factor.device or dtype != factor.dtype:
        raise MethodError(
            f"gated stack: tokens are {dtype} on {x.device}, the stack is {factor.dtype} on "
            f"{factor.device}",
            "bring both to one device and dtype",
        )
