"""Launches of the Triton kernels: tiles, grids and output memory. Imported only when chosen."""

import contextlib
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lora_merge.kernels.gate_rule import Rule
from lora_merge.kernels.gated_stack.gpu.jit import (
    _triton_expand,
    _triton_gate,
    _triton_gate_expand,
    _triton_shrink,
)
from lora_merge.kernels.gated_stack.layout import WORD, Layout

INTERPRETED = type(_triton_shrink.shrink_kernel).__name__ == "InterpretedFunction"
_PIECE = 1024  # width of a piece of the scores' products; of the width alone, or bits would depend
# on the tokens beside a token
NARROW = 64  # tokens up to which the own shrink is used; above, a library GEMM is


@dataclass(frozen=True)
class Tiles:
    """Shape of a launch; chosen by what the compiler makes of it for cc 9.0, not yet by timing.

    Attributes:
        m: Tokens of a tile.
        n: Rows (shrink) or outputs (expand) of a tile.
        k: Width (shrink) or units (gate and expand in one) that are read at once.
        split: Pieces the width is cut into (shrink).
        warps: Warps of a program.
        stages: Loads in flight of a loop, plus one.
    """

    m: int
    n: int
    k: int = 0
    split: int = 1
    warps: int = 4
    stages: int = 3


def shrink_tiles(
    tokens: int, width: int, num_rows: int, processors: int, size: int = 2
) -> Tiles | None:
    """How to shrink entries of `size` bytes, or None where a library's GEMM does it better.

    Few rows make few programs, so the width is cut until every processor has two.
    """
    if tokens > NARROW:
        return None
    if tokens == 1:
        return Tiles(1, 16, 512, split=min(8, _cdiv(width, 512)))
    m, n, k = (16 if tokens <= 16 else 32), 32, 256 if size == 2 else 64
    split = max(1, min(2 * processors // _cdiv(num_rows, n), _cdiv(width, k), 16))
    return Tiles(m, n, k, split)


def expand_tiles(tokens: int, width: int) -> Tiles:
    """How to expand."""
    if tokens <= 16:
        return Tiles(16, 32 if width <= 4096 else 64)
    if tokens <= 128:
        return Tiles(32, 64 if width <= 4096 else 128)
    return Tiles(128, 128, warps=8)


@lru_cache
def gate_expand_tiles(tokens: int, width: int, size: int = 2) -> Tiles:
    """How to gate and expand at once; `width` is that of all members together."""
    if tokens > 1:  # float32 products are made of plain registers
        n, k = 32 if width <= 8192 else 64, 128 if size == 2 else 32
        return Tiles(16, n, k, warps=8, stages=1)
    # 16 kB of `up` asked for at once per 4 warps, in at most 64 registers, so all fit at once.
    n, warps = (32, 4) if width <= 8192 else (64, 8)
    return Tiles(1, n, 256, warps=warps, stages=1)


def shrink(
    x: Tensor, down: Tensor, gate: Tensor | None, tiles: Tiles | None
) -> tuple[Tensor, Tensor]:
    """Partial products of tokens with `down` and with the gate's rows.

    Args:
        x: Shape (T, d_in), last dimension contiguous.
        down: Shape (n, d_in), contiguous, of the same dtype.
        gate: Shape (m, d_in), contiguous, of any floating dtype; or None for m = 0.
        tiles: The launch, or None for a library's GEMM.

    Returns:
        Shapes (split, T, n) and (split, T, m), float32, m > 0 columns of one tensor; from a GEMM
        split = 1 and the dtype of `x`, and what `score` gives.
    """
    if tiles is None:
        u = functional.linear(x, down)[None]
        return u, u if gate is None else score(x, gate)
    (tokens, width), units = x.shape, down.shape[0]
    other = down if gate is None else gate
    scores = 0 if gate is None else gate.shape[0]
    parts = torch.empty(tiles.split, tokens, units + scores, dtype=torch.float32, device=x.device)
    tiles_n = _cdiv(units, tiles.n) + _cdiv(scores, tiles.n)
    arithmetic, mixed = _arithmetic(x.dtype), other.dtype != x.dtype
    with _on(x.device):
        _triton_shrink.shrink_kernel[(_cdiv(tokens, tiles.m), tiles_n, tiles.split)](
            x, down, other, parts, tokens, x.stride(0), units, scores, width,
            BM=tiles.m, BN=tiles.n, BK=tiles.k, GATE_BK=tiles.k // 2, SPLIT=tiles.split,
            GATE_UPCAST=mixed or arithmetic["UPCAST"], **arithmetic,
            # A half precision number is a TF32 number; three of its products with the parts of a
            # float32 number are exact but for 2^-21.
            GATE_PRECISION="tf32x3" if mixed and not INTERPRETED else arithmetic["PRECISION"],
            num_warps=tiles.warps, num_stages=tiles.stages, enable_fp_fusion=False,
        )  # fmt: skip
    return parts[:, :, :units], parts[:, :, units:]


def score(x: Tensor, gate: Tensor) -> Tensor:
    """Products of tokens with the gate's rows.

    Tensor cores make them where the gate's numbers are sums of few numbers of the tokens' dtype;
    elsewhere a library does, in the gate's dtype.

    Args:
        x: Shape (T, d_in), last dimension contiguous.
        gate: Shape (n, d_in), contiguous, of any floating dtype.

    Returns:
        Pieces that add up to the products, shape (split, T, n), contiguous; float32, or from a
        library in the dtype of `gate`.
    """
    if x.dtype == gate.dtype and x.dtype != torch.float32:
        pieces = 1
    elif x.dtype == torch.bfloat16 and gate.dtype == torch.float32:
        pieces = 3
    else:
        return functional.linear(x.to(gate.dtype), gate)[None]
    (tokens, width), scores = x.shape, gate.shape[0]
    split = min(16, _cdiv(width, _PIECE))
    parts = torch.empty(split, tokens, scores, dtype=torch.float32, device=x.device)
    with _on(x.device):
        _triton_shrink.score_kernel[(_cdiv(tokens, 128), _cdiv(scores, 64), split)](
            x, gate, parts, tokens, x.stride(0), scores, width, BM=128, BN=64, BK=64, SPLIT=split,
            PIECES=pieces, UPCAST=INTERPRETED, num_warps=8, num_stages=3, enable_fp_fusion=False,
        )  # fmt: skip
    return parts


def gate(
    parts: Tensor,
    scores: Tensor,
    layout: Layout,
    dtype: torch.dtype,
    *,
    rule: Rule | None = None,
    bias: Tensor | None = None,
    keep_u: bool = False,
    block: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Add the pieces up, and weigh the units.

    Args:
        parts: Pieces of the units, shape (split, T, M R), as `shrink` gives them.
        scores: Pieces of the scores, shape (split, T, M n); without a rule the weights themselves,
            shape (1, T', M C), T' dividing T.
        layout: Units and their weights.
        dtype: Of the result.
        rule: How scores become weights.
        bias: For the selection alone, shape (M n,).
        keep_u: Whether the units before the gate are wanted.
        block: Tokens of a program, a power of two; default: so that there are enough programs.

    Returns:
        z, shape (T, M R); its words, shape (T, M ceil(R / 32)); the units before the gate, shape
        (T, M R), or (0,) if not wanted.
    """
    split, tokens, _ = parts.shape
    members, units, num_words = layout.members, layout.num_units, layout.num_words
    device = parts.device
    z = torch.empty(tokens, members * units, dtype=dtype, device=device)
    words = torch.empty(tokens, members * num_words, dtype=torch.int32, device=device)
    u = torch.empty((tokens, members * units) if keep_u else (0,), dtype=dtype, device=device)
    count = layout.num_weights + (rule is not None and rule.null_row)
    block = block or (1 if tokens <= 64 else 4)
    with _on(device):
        _triton_gate.gate_kernel[(_cdiv(tokens, block), members)](
            parts, scores, layout.columns, parts if bias is None else bias, z, words, u,
            tokens, tokens // scores.shape[1], parts.stride(1), scores.stride(1),
            parts.stride(0), scores.stride(0), units, count, num_words, *_numbers(rule),
            MEMBERS=members, SPLIT=split, SCORE_SPLIT=scores.shape[0], **_rule(rule, count),
            BIAS=bias is not None, KEEP_U=keep_u, BT=block, BR=min(256, max(WORD, _power(units))),
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return z, words, u


def expand(y: Tensor, z: Tensor, up: Tensor, words: Tensor | None, tiles: Tiles) -> Tensor:
    """Add the units' outputs to the base module's.

    Args:
        y: Shape (T, d_out), last dimension contiguous.
        z: Shape (T, R), last dimension contiguous.
        up: Shape (R, d_out), contiguous.
        words: Shape (T, ceil(R / 32)), or None to read every row of `up`.
        tiles: The launch.

    Returns:
        Shape (T, d_out), contiguous, in the dtype of `y`.
    """
    (tokens, width), units = y.shape, up.shape[0]
    out = torch.empty(tokens, width, dtype=y.dtype, device=y.device)
    with _on(y.device):
        _triton_expand.expand_kernel[(_cdiv(tokens, tiles.m), _cdiv(width, tiles.n))](
            y, z, up, z if words is None else words, out, tokens,
            y.stride(0), z.stride(0), 0 if words is None else words.stride(0), units, width,
            BM=tiles.m, BN=tiles.n, SKIP=words is not None,
            **_arithmetic(z.dtype), num_warps=tiles.warps, num_stages=tiles.stages,
            enable_fp_fusion=False,
        )  # fmt: skip
    return out


def gate_expand(
    y: Tensor,
    parts: Tensor,
    scores: Tensor,
    up: Tensor,
    widths: tuple[int, ...],
    columns: Tensor,
    tiles: Tiles,
    dtype: torch.dtype,
    *,
    rule: Rule | None = None,
    bias: Tensor | None = None,
    early: bool = False,
) -> Tensor:
    """Gate the units of a few tokens, and add their outputs to the base modules'.

    Args:
        y: The members' outputs side by side, shape (T, sum of d_out), of any floating dtype.
        parts: Pieces of the units, shape (split, T, M R).
        scores: Pieces of the scores, shape (split', T, M n); without a rule the weights themselves,
            shape (1, T', M C), T' dividing T.
        up: Every up_m of shape (R, d_out), one after another, contiguous.
        widths: Every d_out.
        columns: Weight that each unit of one member takes, int64, shape (R,).
        tiles: The launch.
        dtype: Of the result.
        rule: How scores become weights.
        bias: For the selection alone, shape (M n,).
        early: Begin to read `up` while the launch before this one still runs (programmatic
            dependent launch); for one that does not write `up`, `columns` or `bias`.

    Returns:
        Every (T, d_out), one after another.
    """
    tokens, units, members = y.shape[0], columns.shape[0], len(widths)
    count = scores.shape[2] // members
    out = torch.empty(tokens * sum(widths), dtype=dtype, device=up.device)
    programs = sum(_cdiv(width, tiles.n) for width in widths)
    chunk = min(tiles.k, max(16, _power(units)))
    with _on(up.device):
        _triton_gate_expand.gate_expand_kernel[(programs, _cdiv(tokens, tiles.m))](
            y, parts, scores, columns, parts if bias is None else bias, up, out,
            tokens, tokens // scores.shape[1], y.stride(0), parts.stride(1), scores.stride(1),
            parts.stride(0), scores.stride(0), units, count, *_numbers(rule), widths,
            MEMBERS=members, SPLIT=parts.shape[0], SCORE_SPLIT=scores.shape[0],
            **_rule(rule, count), BIAS=bias is not None, SPARSE=rule is None or rule.is_sparse,
            SKIP=_skips(rule, count, min(tokens, tiles.m)), EARLY=early,
            BT=tiles.m, BN=tiles.n, BR=chunk, ONE_CHUNK=units <= chunk, **_arithmetic(up.dtype),
            num_warps=tiles.warps, num_stages=tiles.stages, enable_fp_fusion=False,
            **({"launch_pdl": True} if early else {}),
        )  # fmt: skip
    return out


def _skips(rule: Rule | None, count: int, tokens: int) -> bool:
    """Whether so few rows of `up` are used that it pays to know which before asking for them.

    To know first costs a trip to memory, more than reading half of the rows does.
    """
    if rule is None:
        return True
    if rule.top_k is None:
        return False
    return (1 - rule.top_k / max(count, rule.top_k)) ** tokens > 0.5


@cache
def overlaps(device: torch.device) -> bool:
    """Whether a launch may begin while the one before it ends: compute capability 9.0 and later."""
    known = device.type == "cuda" and torch.version.hip is None
    return known and torch.cuda.get_device_capability(device) >= (9, 0)


def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; two for the interpreter."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache
def _rule(rule: Rule | None, count: int) -> dict[str, Any]:
    """Constants of a gate; without a rule the weights are given."""
    rule, kind = rule or Rule(), "given" if rule is None else rule.value
    null = int(rule.null_score is not None)
    kept = rule.top_k or 0
    return {
        "KIND": _triton_gate.KINDS.index(kind), "TOP_K": kept if kept < count + null else 0,
        "ABSOLUTE": rule.absolute, "NULL": null, "BS": _power(count + null),
    }  # fmt: skip


@lru_cache
def _numbers(rule: Rule | None) -> tuple[float, float, float]:
    """Temperature, factor and score of the null expert."""
    rule = rule or Rule()
    return float(rule.temperature), float(rule.factor), float(rule.null_score or 0.0)


def _arithmetic(dtype: torch.dtype) -> dict[str, Any]:
    """Constants of a product. The interpreter multiplies bfloat16 as bit patterns: upcast there."""
    exact = dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32
    return {
        "UPCAST": INTERPRETED and dtype == torch.bfloat16,
        "PRECISION": "ieee" if exact or INTERPRETED else "tf32",
    }


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _power(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << max(0, n - 1).bit_length()


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, whatever the tensors' is."""
    if device.type == "cuda" and device.index not in (None, torch.cuda.current_device()):
        return torch.cuda.device(device)
    return contextlib.nullcontext()
