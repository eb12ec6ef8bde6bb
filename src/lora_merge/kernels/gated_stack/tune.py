"""Measure the implementations on a device, and keep what was measured for `dispatch`."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_merge.errors import MethodError
from lora_merge.files.atomic import atomic_file
from lora_merge.files.documents import read_cache
from lora_merge.kernels.gated_stack import dispatch
from lora_merge.kernels.gated_stack.dispatch import Case, GateKind, case_of
from lora_merge.kernels.gated_stack.gpu import fused
from lora_merge.kernels.gated_stack.tune_cases import RULES, StackShape, prepare
from lora_merge.machine.timing import Timing, measure

_CLOSE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


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
    for shape, count, (kind, rule) in product(shapes, tokens, RULES.items()):
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
    old = read_cache(dispatch.TunedTable, path)
    whole = read_cache(dict[str, Any], path) if old and old.versions == versions else None
    kept = whole["rows"] if whole else {}
    table = {"device": name, "versions": versions, "rows": {**kept, **new}}
    with contextlib.suppress(OSError):  # the next line tells what is wrong
        path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path, "set XDG_CACHE_HOME to a writable place") as staging:
        staging.write_text(json.dumps(table, indent=1))
    dispatch.forget()
    return path


# -- one case ------------------------------------------------------------------------------------


def _time(
    shape: StackShape,
    tokens: int,
    kind: GateKind,
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
    graph: bool,
) -> Measured:
    refused = fused.refusal(device, dtype)
    trial = prepare(shape, tokens, RULES[kind], device, dtype, triton=not refused)
    ways = dict(trial.plain)
    excluded = {"triton": refused} if refused else {}
    with torch.inference_mode():
        for name, way in trial.kernels.items():
            if reason := _differs(way, trial.plain["eager"], dtype):
                excluded[name] = reason
            else:
                ways[name] = way
        turns = {name: partial(_all, way, trial.copies) for name, way in ways.items()}
        timings = measure(turns, device, rounds=rounds, graph=graph)
    each = {
        name: Timing(t.median / trial.copies, t.low / trial.copies, t.high / trial.copies, t.rounds)
        for name, t in timings.items()
    }
    units = len(shape.d_out) * sum(shape.ranks)
    rule, width = RULES[kind], sum(shape.d_out)
    kept = rule.top_k if rule else None
    case = case_of(trial.x, width, units, dtype, kind, len(shape.ranks), kept)
    return Measured(case, each, excluded)


def _all(way: Callable[[int], list[Tensor]], copies: int) -> None:
    """Go through all copies, as a model goes through its layers: no weight is still in a cache."""
    for index in range(copies):
        way(index)


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
