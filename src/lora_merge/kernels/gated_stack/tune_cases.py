"""What `tune` times: each implementation on a group of base modules and its stack."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from lora_merge.kernels.gate_rule import Rule
from lora_merge.kernels.gated_stack.base_matrix import FEW_TOKENS as FEW
from lora_merge.kernels.gated_stack.base_matrix import (
    Joined,
    expand_after,
    expand_with_base,
    join,
    shrink_alone,
    shrink_with_base,
)
from lora_merge.kernels.gated_stack.dispatch import GateKind
from lora_merge.kernels.gated_stack.eager import gate_units
from lora_merge.kernels.gated_stack.gate import weights_of
from lora_merge.kernels.gated_stack.gpu.base_matrix_launch import JoinedStack, gate_pieces
from lora_merge.kernels.gated_stack.layout import Layout
from lora_merge.kernels.gated_stack.operation import gated_expand, gated_shrink, routed_shrink

RULES: dict[GateKind, Rule | None] = {"given": None, "dense": Rule(), "top-k": Rule(top_k=2)}
_COLD = 256 << 20  # bytes that are gone through before the same weights come round again
_MANY, _FEW_KEPT = 256, 4  # tokens, and experts per kept one, from which grouping is tried


@dataclass(frozen=True)
class StackShape:
    """Modules that share their input, and the ranks of their experts.

    Attributes:
        d_in: Input width.
        d_out: Output width of each module.
        ranks: Rank of each expert.
    """

    d_in: int
    d_out: tuple[int, ...]
    ranks: tuple[int, ...]


def llama_shapes(experts: int = 8, rank: int = 16) -> list[StackShape]:
    """The four groups of modules of a Llama-3-8B layer."""
    widths = ((4096, (4096, 1024, 1024)), (4096, (4096,)), (4096, (14336,) * 2), (14336, (4096,)))
    return [StackShape(d_in, d_out, (rank,) * experts) for d_in, d_out in widths]


@dataclass(frozen=True, eq=False)
class Trial:
    """Implementations of one case; each takes the number of a copy of the weights.

    Attributes:
        x: The tokens, shape (T, d_in).
        copies: How many copies there are.
        plain: In PyTorch, `base` for the modules without experts.
        kernels: In Triton; none where they cannot run.
    """

    x: Tensor
    copies: int
    plain: Mapping[str, Callable[[int], list[Tensor]]]
    kernels: Mapping[str, Callable[[int], list[Tensor]]]


@dataclass(frozen=True, eq=False)
class _Modules:
    """A group of base modules with its stack."""

    weights: list[Tensor]
    down: Tensor
    gate: Tensor
    ups: list[Tensor]


def prepare(
    shape: StackShape,
    tokens: int,
    rule: Rule | None,
    device: torch.device,
    dtype: torch.dtype,
    *,
    triton: bool,
) -> Trial:
    """Random weights and tokens, and what runs on them.

    Args:
        shape: The modules and their experts.
        tokens: T.
        rule: The gate; None for given weights.
        device: Where.
        dtype: Of factors and base weights; the gate's rows are float32, as in a model.
        triton: Whether kernels can run there.
    """
    random = torch.Generator(device).manual_seed(0)

    def draw(*size: int) -> Tensor:
        entries = torch.randn(size, generator=random, device=device)
        return (entries / math.sqrt(size[-1])).to(dtype)

    members, units, experts = len(shape.d_out), sum(shape.ranks), len(shape.ranks)

    def modules() -> _Modules:
        return _Modules(
            [draw(width, shape.d_in) for width in shape.d_out],
            draw(members * units, shape.d_in),
            draw(members * experts, shape.d_in).float(),
            [draw(units, width) for width in shape.d_out],
        )

    owners = [e for e, rank in enumerate(shape.ranks) for _ in range(rank)]
    block = shape.ranks[0] if len(set(shape.ranks)) == 1 else None
    layout = Layout(torch.tensor(owners, device=device), experts, block, members, sum(shape.d_out))
    x = draw(tokens, shape.d_in)
    gate = rule or torch.rand(tokens, members * experts, device=device)
    first = modules()
    size = sum(t.numel() * t.element_size() for t in (*first.weights, first.down, *first.ups))
    copies = [first, *(modules() for _ in range(min(15, _COLD // size)))]
    rides = rule is not None and dtype == torch.float32  # only then can gate rows stand beside W
    matrices = [
        join(c.weights, c.ups, c.down, c.gate if rides else None, border=tokens > FEW)
        for c in copies
    ]
    plain: dict[str, Callable[[int], list[Tensor]]] = {
        "base": lambda i: [functional.linear(x, w) for w in copies[i].weights],
        "eager": lambda i: _stacked(x, copies[i], layout, gate, "eager"),
        "concat": lambda i: _concat(x, copies[i], matrices[i], layout, gate),
    }
    if not triton:
        return Trial(x, len(copies), plain, {})
    kernels = {"triton": lambda i: _stacked(x, copies[i], layout, gate, "triton")}
    if dtype != torch.float16:
        there = rides and tokens <= FEW
        pieced = matrices if there else [_pieced(c, rule) for c in copies]
        kernels["joined"] = lambda i: _joined(x, pieced[i], layout, gate)
    kept = 0 if rule is None else rule.top_k or 0
    if kept and experts >= _FEW_KEPT * kept and tokens >= _MANY:
        kernels["grouped"] = lambda i: _stacked(x, copies[i], layout, gate, "grouped")
    return Trial(x, len(copies), plain, kernels)


def _stacked(
    x: Tensor, modules: _Modules, layout: Layout, rule: Rule | Tensor, how: str
) -> list[Tensor]:
    ys = [functional.linear(x, weight) for weight in modules.weights]
    if isinstance(rule, Rule):
        units = routed_shrink(x, modules.down, modules.gate, layout, rule, implementation=how)
    else:
        units = gated_shrink(x, modules.down, rule, layout, implementation=how)
    return [
        gated_expand(y, part, up, implementation=how)
        for y, part, up in zip(ys, units, modules.ups, strict=True)
    ]


def _concat(
    x: Tensor, modules: _Modules, joined: Joined, layout: Layout, rule: Rule | Tensor
) -> list[Tensor]:
    def gated(u: Tensor, raw: Tensor) -> list[Tensor]:
        if isinstance(rule, Rule):
            scores = raw if joined.scores else functional.linear(x.float(), modules.gate)
            weights = weights_of(scores.unflatten(1, (layout.members, -1)), rule).flatten(1)
        else:
            weights = rule
        columns = layout.joined if layout.block is None else None
        z = gate_units(u, weights, layout.block, columns)
        return list(z.split(layout.num_units, dim=1))

    if len(x) <= FEW:
        ys, u, raw = shrink_with_base(x, joined)
        return expand_after(ys, gated(u, raw), joined)
    return expand_with_base(x, gated(*shrink_alone(x, joined)), joined)


def _pieced(modules: _Modules, rule: Rule | None) -> Joined:
    """A group's matrix with its float32 gate rows in pieces."""
    gate = None if rule is None else gate_pieces(modules.gate, modules.down.dtype)
    return join(modules.weights, modules.ups, modules.down, gate, border=False)


def _joined(x: Tensor, joined: Joined, layout: Layout, rule: Rule | Tensor) -> list[Tensor]:
    if isinstance(rule, Rule):
        outs = JoinedStack(joined, layout, scores=layout.widths[1], rule=rule)(x)
    else:
        outs = JoinedStack(joined, layout)(x, rule)
    return [out.view(len(x), -1) for out in outs]
