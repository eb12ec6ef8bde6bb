"""Decide everything about a merge from headers alone."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from lora_merge.adapters import (
    DTYPES,
    Adapter,
    AlignedModule,
    Alignment,
    OutputPlan,
    RankLayout,
    align,
    plan_output,
)
from lora_merge.errors import AlignmentError, MethodError
from lora_merge.merge.registry import Method, find_method

ExtrasPolicy = Literal["average", "first", "drop", "error"]


@dataclass(frozen=True, eq=False)
class MergePlan:
    """A merge, ready to run.

    Attributes:
        alignment: Adapters (canonical order) and modules.
        weights: Weight of each adapter, by index.
        method: The method.
        options: Its parsed parameters.
        ranks: Rank of each module's result.
        seed: Seed of all randomness.
        extras: Tensor that is not a factor → the adapters whose tensors are averaged for it.
        output: What is written.
        notes: What the user should know before the work starts.
    """

    alignment: Alignment
    weights: tuple[float, ...]
    method: Method
    options: Any
    ranks: Mapping[str, int]
    seed: int
    extras: Mapping[str, tuple[Adapter, ...]]
    output: OutputPlan
    notes: tuple[str, ...]

    def peak_bytes(self, jobs: int) -> int:
        """Estimated working memory in bytes.

        Per worker: the largest module as stored and as float32 stack, its Grams and its result.
        """
        return jobs * max(self._module_bytes(module) for module in self.alignment.modules)

    def _module_bytes(self, module: AlignedModule) -> int:
        stored = sum(s.num_parameters * DTYPES[s.dtype].itemsize for s in module.specs.values())
        result = module.stack_bytes() * self.ranks[module.name] // module.num_units
        return stored + module.stack_bytes() + 2 * result + 4 * 8 * module.num_units**2


def plan_merge(
    adapters: Sequence[Adapter],
    *,
    method: str,
    rank: int,
    weights: Sequence[float] | None = None,
    parameters: Mapping[str, Any] | None = None,
    seed: int = 0,
    dtype: str | None = None,
    layout: RankLayout = "uniform",
    extras: ExtrasPolicy = "average",
    force: bool = False,
) -> MergePlan:
    """Check adapters and parameters and plan the merge. Reads no tensor.

    Args:
        adapters: Any order; the result does not depend on it.
        method: Name of a method.
        rank: Rank of the result; a module with fewer units keeps them all.
        weights: One per adapter, default 1. An adapter of weight 0 counts as absent.
        parameters: Parameters of the method.
        seed: Seed of all randomness.
        dtype: Output dtype as a torch name ("bfloat16"); default: the widest of the inputs.
        layout: Uniform rank, or ranks per module.
        extras: What becomes of biases and modules saved whole: "average" them, keep the "first"
            adapter's, "drop" them, or stop with an "error".
        force: Accept different base models.

    Raises:
        AlignmentError: If the adapters do not fit together.
        MethodError: If the method cannot do what is asked.
    """
    weights = _check_weights(adapters, weights)
    chosen = find_method(method)
    options = chosen.parse(parameters or {})
    align(adapters, force=force)  # an adapter of weight 0 must fit, too
    present = [(a, w) for a, w in zip(adapters, weights, strict=True) if w != 0]
    if not present:
        raise MethodError("all weights are 0", "give at least one adapter a weight")
    as_given = [a for a, _ in present]
    # The result may not depend on the order of the arguments, so there is one order: by name.
    present.sort(key=lambda pair: (pair[0].name, pair[1]))
    alignment = align([a for a, _ in present], force=force)
    ranks, notes = _ranks(alignment, rank)
    kept, extra_notes = _plan_extras(as_given, extras)
    output = plan_output(
        alignment.adapters,
        alignment.modules,
        ranks,
        dtype=_output_dtype(alignment, dtype),
        layout=layout,
        extras={n: (a[0].extras[n].dtype, a[0].extras[n].shape) for n, a in kept.items()},
        base_model=alignment.base_model,
    )
    notes = [
        *notes,
        *_base_notes(alignment),
        *extra_notes,
        *(f"{a.name}: {n}" for a in alignment.adapters for n in a.notes),
    ]
    return MergePlan(
        alignment,
        tuple(w for _, w in present),
        chosen,
        options,
        ranks,
        seed,
        kept,
        output,
        tuple(notes),
    )


def _check_weights(
    adapters: Sequence[Adapter], weights: Sequence[float] | None
) -> tuple[float, ...]:
    if weights is None:
        return (1.0,) * len(adapters)
    if len(weights) != len(adapters):
        raise MethodError(
            f"{len(weights)} weights for {len(adapters)} adapters",
            "give one -w per adapter, in their order",
        )
    bad = [w for w in weights if not abs(w) < float("inf")]
    if bad:
        raise MethodError(f"{bad[0]} is no weight", "weights are finite numbers")
    return tuple(float(w) for w in weights)


def _ranks(alignment: Alignment, rank: int) -> tuple[dict[str, int], list[str]]:
    units = {m.name: m.num_units for m in alignment.modules}
    largest = max(units.values())
    if not 1 <= rank <= largest:
        raise MethodError(
            f"rank {rank} is not possible: the largest module has {largest} units",
            f"the largest rank for these adapters is {largest}",
        )
    ranks = {name: min(rank, size) for name, size in units.items()}
    few = Counter(size for size in units.values() if size < rank)
    notes = [
        f"{count} modules have only {size} units and keep them all" for size, count in few.items()
    ]
    return ranks, notes


def _base_notes(alignment: Alignment) -> list[str]:
    bases = sorted({a.config.base_model for a in alignment.adapters if a.config.base_model})
    return [f"base models differ: {', '.join(bases)}"] if len(bases) > 1 else []


def _output_dtype(alignment: Alignment, dtype: str | None) -> str:
    codes = {torch_dtype: code for code, torch_dtype in DTYPES.items()}
    if dtype is not None:
        chosen = getattr(torch, dtype, None)
        if chosen not in codes:
            names = ", ".join(str(t).removeprefix("torch.") for t in codes)
            raise MethodError(f"{dtype!r} is no dtype for factors", f"choose from: {names}")
        return codes[chosen]
    inputs = {s.dtype for m in alignment.modules for s in m.specs.values()}
    widest, *others = (DTYPES[code] for code in sorted(inputs))
    for other in others:
        widest = torch.promote_types(widest, other)
    return codes[widest]


def _plan_extras(
    adapters: Sequence[Adapter], policy: ExtrasPolicy
) -> tuple[dict[str, tuple[Adapter, ...]], list[str]]:
    """Which tensors that are not factors are kept, from which adapters, and what to say of it."""
    owners: dict[str, list[Adapter]] = {}
    for adapter in adapters:
        for name in adapter.extras:
            owners.setdefault(name, []).append(adapter)
    if not owners:
        return {}, []
    what = f"{len(owners)} tensors that are not low-rank factors ({_some(list(owners))})"
    if policy == "error":
        raise AlignmentError([f"there are {what}"], "choose --extras average, first or drop")
    if policy == "drop":
        return {}, [f"dropped {what}"]
    if policy == "first":
        chosen = {name: holders[:1] for name, holders in owners.items()}
    else:
        chosen = {name: sorted(holders, key=lambda a: a.name) for name, holders in owners.items()}
    mismatches = [m for name, holders in chosen.items() if (m := _extra_mismatch(name, holders))]
    if mismatches:
        raise AlignmentError(
            mismatches, "these tensors cannot be averaged; choose --extras first or --extras drop"
        )
    verb = "averaged" if policy == "average" else "kept the first adapter's"
    return {name: tuple(chosen[name]) for name in sorted(chosen)}, [f"{verb} {what}"]


def _extra_mismatch(name: str, holders: Sequence[Adapter]) -> str | None:
    """Why the holders' tensors of this name have no average, or None."""
    kinds: dict[str, str] = {}
    for holder in holders:
        spec = holder.extras[name]
        if spec.dtype not in DTYPES:
            return f"{name}: dtype {spec.dtype} ({holder.name})"
        kinds.setdefault(str(list(spec.shape)), holder.name)
    if len(kinds) == 1:
        return None
    return f"{name}: " + ", ".join(f"{shape} ({who})" for shape, who in kinds.items())


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:2]) + (", …" if len(names) > 2 else "")
