"""Measure the implementations on a device, and keep what was measured for `dispatch`."""

import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lora_merge.errors import MethodError, OutputError
from lora_merge.kernels.gated_stack import dispatch, fused
from lora_merge.kernels.gated_stack.concat import FEW_TOKENS as FEW
from lora_merge.kernels.gated_stack.concat import (
    Joined,
    expand_after,
    expand_with_base,
    join,
    shrink_alone,
    shrink_with_base,
)
from lora_merge.kernels.gated_stack.dispatch import Case, GateKind, case_of
from lora_merge.kernels.gated_stack.eager import gate_units
from lora_merge.kernels.gated_stack.gate import Rule, weights_of
from lora_merge.kernels.gated_stack.joined import JoinedStack, gate_pieces
from lora_merge.kernels.gated_stack.layout import Layout
from lora_merge.kernels.gated_stack.operation import gated_expand, gated_shrink, routed_shrink
from lora_merge.kernels.timing import Timing, measure

_COLD = 256 << 20  # bytes that are gone through before the same weights come round again
_CLOSE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_MANY, _FEW_KEPT = 256, 4  # tokens, and experts per kept one, from which grouping is tried
_RULES: dict[GateKind, Rule | None] = {"given": None, "dense": Rule(), "top-k": Rule(top_k=2)}


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


@dataclass(frozen=True)
class Measured:
    """One case and how long each implementation took, base modules included.

    Attributes:
        case: The case.
        timings: By implementation, and `base` for the modules without experts.
        excluded: Implementation → why it was not measured.
    """

    case: Case
    timings: Mapping[str, Timing]
    excluded: Mapping[str, str]

    @property
    def fastest(self) -> str:
        """The fastest implementation."""
        return min((n for n in self.timings if n != "base"), key=lambda n: self.timings[n].median)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        timings = {name: asdict(timing) for name, timing in self.timings.items()}
        seconds = {n: t.median for n, t in self.timings.items() if n != "base"}
        return {
            "case": asdict(self.case), "seconds": seconds, "fastest": self.fastest,
            "timings": timings, "excluded": dict(self.excluded),
        }  # fmt: skip


def tune(
    shapes: Sequence[StackShape],
    device: torch.device,
    dtype: torch.dtype,
    *,
    tokens: Sequence[int] = (1, 16, 256, 4096),
    rounds: int = 9,
    graph: bool = False,
) -> Iterator[Measured]:
    """Time every implementation on every case, with random weights.

    Args:
        shapes: Stacks to time.
        device: Where.
        dtype: Of factors and base weights.
        tokens: Token counts.
        rounds: How often each is timed.
        graph: Time replays of CUDA graphs instead of separate launches.

    Raises:
        MethodError: If the dtype cannot be timed.
    """
    if dtype not in _CLOSE:
        raise MethodError(f"cannot tune for {dtype}", "float32, float16 or bfloat16")
    for shape, count, (kind, rule) in product(shapes, tokens, _RULES.items()):
        if rule is None or rule.top_k is None or rule.top_k < len(shape.ranks):
            yield _time(shape, count, kind, device, dtype, rounds, graph)


def store(rows: Sequence[Measured], device: torch.device) -> Path:
    """Add measurements to the device's table, whole or not at all.

    Returns:
        The table's file.

    Raises:
        OutputError: If it cannot be written.
    """
    name = dispatch.device_name(device)
    path = dispatch.table_path(name)
    new = {row.case.key: row.to_dict() for row in rows}
    versions = dispatch.versions()
    try:
        old = json.loads(path.read_text())
        kept = old["rows"] if old["versions"] == versions else {}
    except (OSError, ValueError, KeyError, TypeError):
        kept = {}
    table = {"device": name, "versions": versions, "rows": {**kept, **new}}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(table, file, indent=1)
        Path(file.name).replace(path)
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror}", "set XDG_CACHE_HOME to a writable place"
        ) from error
    dispatch.forget()
    return path


# -- one case ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Modules:
    """A group of base modules with its stack."""

    weights: list[Tensor]
    down: Tensor
    gate: Tensor
    ups: list[Tensor]


def _time(
    shape: StackShape,
    tokens: int,
    kind: GateKind,
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
    graph: bool,
) -> Measured:
    random = torch.Generator(device).manual_seed(0)

    def draw(*size: int) -> Tensor:
        entries = torch.randn(size, generator=random, device=device)
        return (entries / math.sqrt(size[-1])).to(dtype)

    members, units, experts = len(shape.d_out), sum(shape.ranks), len(shape.ranks)

    def modules() -> _Modules:
        return _Modules(
            [draw(width, shape.d_in) for width in shape.d_out],
            draw(members * units, shape.d_in),
            draw(members * experts, shape.d_in).float(),  # as in a model: gates are float32
            [draw(units, width) for width in shape.d_out],
        )

    owners = [e for e, rank in enumerate(shape.ranks) for _ in range(rank)]
    block = shape.ranks[0] if len(set(shape.ranks)) == 1 else None
    columns = torch.tensor(owners, device=device)
    layout = Layout(columns, experts, block, members, sum(shape.d_out))
    x = draw(tokens, shape.d_in)
    rule = _RULES[kind] or torch.rand(tokens, members * experts, device=device)
    first = modules()
    size = sum(t.numel() * t.element_size() for t in (*first.weights, first.down, *first.ups))
    copies = [first, *(modules() for _ in range(min(15, _COLD // size)))]
    rides = dtype == torch.float32 and isinstance(
        rule, Rule
    )  # only then can gate rows stand in the matrix
    joined = [
        join(c.weights, c.ups, c.down, c.gate if rides else None, border=tokens > FEW)
        for c in copies
    ]
    ways: dict[str, Callable[[int], list[Tensor]]] = {
        "base": lambda i: [functional.linear(x, w) for w in copies[i].weights],
        "eager": lambda i: _stacked(x, copies[i], layout, rule, "eager"),
        "concat": lambda i: _concat(x, copies[i], joined[i], layout, rule),
    }
    kernels = {"triton": lambda i: _stacked(x, copies[i], layout, rule, "triton")}
    refused = fused.refusal(device, dtype)
    if tokens <= FEW and not refused and dtype != torch.float16:
        pieced = joined if rides else [_pieced(c, rule) for c in copies]
        kernels["joined"] = lambda i: _joined(x, pieced[i], layout, rule)
    kept = rule.top_k if isinstance(rule, Rule) else None
    if kept and experts >= _FEW_KEPT * kept and tokens >= _MANY:
        kernels["grouped"] = lambda i: _stacked(x, copies[i], layout, rule, "grouped")
    excluded = {}
    with torch.inference_mode():
        for name, way in kernels.items():
            reason = refused or _differs(way, ways["eager"], dtype)
            if reason:
                excluded[name] = reason
            else:
                ways[name] = way
        turns = {name: partial(_all, way, len(copies)) for name, way in ways.items()}
        timings = measure(turns, device, rounds=rounds, graph=graph)
    each = {
        name: Timing(t.median / len(copies), t.low / len(copies), t.high / len(copies), t.rounds)
        for name, t in timings.items()
    }
    case = case_of(x, layout.outputs, members * units, dtype, kind)
    return Measured(case, each, excluded)


def _all(way: Callable[[int], list[Tensor]], copies: int) -> None:
    """Go through all copies, as a model goes through its layers: no weight is still in a cache."""
    for index in range(copies):
        way(index)


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


def _pieced(modules: _Modules, rule: Rule | Tensor) -> Joined:
    """A group's matrix with its float32 gate rows in pieces."""
    gate = gate_pieces(modules.gate, modules.down.dtype) if isinstance(rule, Rule) else None
    return join(modules.weights, modules.ups, modules.down, gate, border=False)


def _joined(x: Tensor, joined: Joined, layout: Layout, rule: Rule | Tensor) -> list[Tensor]:
    if isinstance(rule, Rule):
        outs = JoinedStack(joined, layout.columns, rule=rule)(x)
    else:
        outs = JoinedStack(joined, layout.columns)(x, rule)
    return [out.view(len(x), -1) for out in outs]


def _differs(
    kernel: Callable[[int], list[Tensor]], eager: Callable[[int], list[Tensor]], dtype: torch.dtype
) -> str:
    """Why a kernel's result is not to be trusted here; empty if it is eager's, but for rounding.

    One token in a hundred may differ: of two scores that are almost equal either may be kept.
    """
    dispatch.forget()
    try:
        ours, plain = kernel(0), eager(0)
    except Exception as error:
        return f"failed: {type(error).__name__}: {error}"
    if failed := dispatch.failed():
        return "; ".join(f"{name} failed: {reason}" for name, reason in failed.items())
    for a, b in zip(ours, plain, strict=True):
        far = (a.float() - b.float()).abs().amax(dim=1) > _CLOSE[dtype] * b.float().abs().max()
        if float(far.float().mean()) > 0.01:
            return "its results are not those of eager"
    return ""
