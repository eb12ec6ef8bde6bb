"""Every launch that the tile choosers can ask for, noted on tensors without memory and not made."""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from lora_merge.kernels.gate_rule import Rule, Value
from lora_merge.kernels.gated_stack.gpu import (
    _launch,
    _launch_grouped,
    grouped,
)
from lora_merge.kernels.gated_stack.gpu.jit import (
    _triton_expand,
    _triton_gate,
    _triton_gate_expand,
    _triton_grouped,
    _triton_shrink,
)
from lora_merge.kernels.gated_stack.layout import Layout, Places

_ROOMS = {  # kernels of one family, by what their names begin with
    "": (_triton_shrink, _triton_gate, _triton_expand),
    "gate and expand: ": (_triton_gate_expand,),
    "grouped: ": (_triton_grouped,),
}
_TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16",
    torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "launch_pdl")
PROCESSORS = {80: 108, 89: 128, 90: 132, 100: 148}  # of the largest GPU of a compute capability
_TOKENS = (1, 2, 16, 17, 64, 65, 129)  # on both sides of each bound of the tile choosers
_WIDTHS = ((4096, (4096, 1024, 1024)), (4096, (14336, 14336)), (14336, (4096,)), (72, (40, 9)))
_EXPERTS = ((28, 8), (64, 16), (3, 5))
_STACKS = (  # widths, experts and rank, pieces of the units and of the scores
    ((14336, 14336), (28, 8), (1, 3)), ((4096, 1024, 1024), (64, 16), (8, 8)),
    ((40, 9), (3, 5), (1, 1)),
)  # fmt: skip
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_VALUES: tuple[Value, ...] = ("softmax", "softmax_all", "softmax_twice", "sigmoid", "raw", "binary")
_RULES = (
    None, *(Rule(value, k) for value in _VALUES for k in (None, 2)),
    Rule("softmax", 2, absolute=True, null_score=0.1), Rule("softmax_all", None, null_score=0.1),
    Rule("softmax", 2, null_row=True), Rule("softmax", 8),
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Launch:
    """One launch as the compiler sees it.

    Attributes:
        name: Of the kernel, with its family.
        kernel: Triton's function.
        signature: Argument → type.
        constants: Argument (or place in a tuple) → value, with those that Triton makes constant.
        aligned: Arguments that are multiples of 16.
        options: Warps, stages and fusion.
    """

    name: str
    kernel: Any
    signature: dict[str, Any]
    constants: dict[Any, Any]
    aligned: tuple[tuple[int, ...], ...]
    options: dict[str, Any]

    @property
    def key(self) -> str:
        """Equal for launches that differ in how their arguments are aligned alone."""
        constants = {n: v for n, v in self.constants.items() if isinstance(n, str)}
        types = [k for k in self.signature.values() if k not in ("i32", "i64", "constexpr")]
        return repr((self.name, types, constants, self.options))

    @property
    def features(self) -> set[tuple[Any, ...]]:
        """What a sample should have seen once: each value of each constant and type, each tile."""
        settings = {n: v for n, v in self.constants.items() if isinstance(n, str)}
        tile = tuple(v for n, v in settings.items() if n in ("BM", "BN", "BK", "BT"))
        each = {(self.name, n, str(v)) for n, v in (settings | self.signature).items()}
        return each | {(self.name, tile, self.options["num_warps"])}


class _Recorder:
    def __init__(self, name: str, kernel: Any, found: list[Launch]) -> None:
        self.name, self.kernel, self.found = name, kernel, found

    def __getitem__(self, grid: object) -> "_Recorder":
        return self

    def __call__(self, *arguments: Any, **named: Any) -> None:
        options: dict[str, Any] = {n: named.pop(n) for n in _OPTIONS if n in named}
        signature: dict[str, Any] = {}
        constants: dict[Any, Any] = dict(named)
        aligned: list[tuple[int, ...]] = []
        for place, parameter in enumerate(self.kernel.params):
            name = parameter.name
            if name in named:
                signature[name] = "constexpr"
                continue
            value = arguments[place]
            if isinstance(value, tuple):
                kinds = [
                    _kind(v, parameter, (place, i), constants, aligned) for i, v in enumerate(value)
                ]
                signature[name] = tuple(kinds)
            else:
                signature[name] = _kind(value, parameter, (place,), constants, aligned)
        self.found.append(
            Launch(self.name, self.kernel, signature, constants, tuple(aligned), options)
        )


def _kind(
    value: Any,
    parameter: Any,
    path: tuple[int, ...],
    constants: dict[Any, Any],
    aligned: list[tuple[int, ...]],
) -> str:
    """Type of an argument; Triton makes a 1 a constant, and looks whether 16 divides the rest."""
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, Tensor):
        start = value.storage_offset() * value.element_size()
        if start % 16 == 0 and not parameter.do_not_specialize_on_alignment:
            aligned.append(path)
        return _TYPES[value.dtype]
    if not parameter.do_not_specialize:
        if value == 1:
            constants[path] = 1
            return "constexpr"
        if value % 16 == 0:
            aligned.append(path)
    return "i32" if value < 2**31 else "i64"


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Note launches instead of making them; for one thread, and tensors on `meta`."""
    found: list[Launch] = []
    held = []
    for family, room in [(f, room) for f, rooms in _ROOMS.items() for room in rooms]:
        for name, kernel in list(vars(room).items()):
            if name.endswith("_kernel"):
                held.append((room, name, kernel))
                short = family + name.removesuffix("_kernel")
                setattr(room, name, _Recorder(short, kernel, found))
    try:
        yield found
    finally:
        for room, name, kernel in held:
            setattr(room, name, kernel)


def launches(capability: int) -> list[Launch]:
    """Every launch that differs to the compiler, over a sweep of shapes, gates and dtypes.

    Args:
        capability: Ten times the compute capability; the number of processors decides some tiles.
    """
    with recording() as found:
        for dtype, (d_in, widths) in product(_DTYPES, _WIDTHS):
            for tokens in _TOKENS:
                _shrinks(tokens, d_in, len(widths), dtype, PROCESSORS.get(capability, 132))
        for dtype, (widths, experts, pieces) in product(_DTYPES, _STACKS):
            for tokens, rule in product(_TOKENS, _RULES):
                _gates(tokens, widths, experts, pieces, dtype, rule, early=capability >= 90)
    return [*{launch.key: launch for launch in reversed(found)}.values()]


def sample(found: Iterable[Launch]) -> list[Launch]:
    """Few launches that together have every value of every constant, every type and every tile."""
    seen: set[tuple[Any, ...]] = set()
    kept = []
    for launch in sorted(found, key=lambda one: -len(one.features)):
        if not launch.features <= seen:
            seen |= launch.features
            kept.append(launch)
    return kept


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _shrinks(tokens: int, d_in: int, members: int, dtype: torch.dtype, processors: int) -> None:
    x = _empty(tokens, d_in, dtype=dtype)
    for experts, rank in _EXPERTS:
        down = _empty(members * experts * rank, d_in, dtype=dtype)
        for gate in (
            None,
            _empty(members * experts, d_in),
            _empty(members * experts, d_in, dtype=dtype),
        ):
            rows = len(down) + (0 if gate is None else len(gate))
            tiles = _launch.shrink_tiles(tokens, d_in, rows, processors, x.element_size())
            _launch.shrink(x, down, gate, tiles)


def _gates(
    tokens: int,
    widths: tuple[int, ...],
    experts: tuple[int, int],
    pieces: tuple[int, int],
    dtype: torch.dtype,
    rule: Rule | None,
    *,
    early: bool,
) -> None:
    """Gate and expand, in one kernel and in two, and grouped where it fits."""
    (count, rank), members = experts, len(widths)
    scores = count + (rule is not None and rule.null_row)
    units, outputs = members * count * rank, sum(widths)
    layout = Layout(_empty(count * rank, dtype=torch.int64), count, rank, members, outputs)
    bias = _empty(members * scores) if rule is not None and rule.top_k == 2 else None
    parts, given = _empty(pieces[0], tokens, units), _empty(1, tokens, members * scores)
    raw = given if rule is None else _empty(pieces[1], tokens, members * scores)
    if tokens <= 16:
        y, up = _empty(tokens, outputs), _empty(count * rank * outputs, dtype=dtype)
        tiles = _launch.gate_expand_tiles(tokens, outputs, up.element_size())
        for before in {False, early and dtype == torch.bfloat16}:
            _launch.gate_expand(
                y, parts, raw, up, widths, layout.columns, tiles, dtype,
                rule=rule, bias=bias, early=before,
            )  # fmt: skip
    z, words, _ = _launch.gate(parts, raw, layout, dtype, rule=rule, bias=bias, keep_u=rule is None)
    z, words = z[:, : count * rank], words[:, : layout.num_words]
    y, up = _empty(tokens, widths[0], dtype=dtype), _empty(count * rank, widths[0], dtype=dtype)
    for used in (words, None):
        _launch.expand(y, z, up, used, _launch.expand_tiles(tokens, widths[0]))
    if rule is not None and grouped.fits(layout, rule):
        x, down = _empty(tokens, 4096, dtype=dtype), _empty(units, 4096, dtype=dtype)
        segments = torch.empty(count, 2, dtype=torch.int32, device="meta")
        tile = _launch_grouped.tile_of(layout, rule)
        experts_of, weights, counts = _launch_grouped.route(raw, layout, rule, bias, tile)
        order, blocks = _launch_grouped.place(experts_of, counts, tile)
        z = _launch_grouped.shrink(x, down, weights, segments, order, blocks, rank)
        places = Places(order[0], blocks[0], weights[0], segments, count * rank)
        _launch_grouped.expand(y, z[0], up, places)
