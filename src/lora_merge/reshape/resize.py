"""Give an adapter new ranks: the best approximation of every delta, and what it costs.

Two passes over the file. The first keeps an r x r SVD per module, from which the rank rule
chooses; the second multiplies the stored factors by r x k matrices and writes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from lora_merge.adapters.adapter import Adapter
from lora_merge.adapters.aligned_module import AlignedModule
from lora_merge.adapters.config import RankLayout
from lora_merge.adapters.formats.table import format_of
from lora_merge.adapters.forms import to_matrix
from lora_merge.adapters.in_memory import MadeAdapter, make
from lora_merge.adapters.measured.spectra import AdapterSpectra, ModuleSpectrum, require_finite
from lora_merge.adapters.rank_stack import RankStack
from lora_merge.adapters.writer import OutputPlan, Writer, plan_output
from lora_merge.errors import MethodError
from lora_merge.files.pages.cards import code, short_card
from lora_merge.files.tensor_file import DTYPES, commonest_dtype
from lora_merge.linalg.factors import gram, pivot_sign
from lora_merge.machine.parallel import in_order
from lora_merge.planning import How, Plan
from lora_merge.printing import Report, Summary
from lora_merge.ranks.choose import RankPlan
from lora_merge.reshape.stored_units import keeps_stored_units, split_units


@dataclass(frozen=True)
class ResizedModule:
    """One module's result.

    Attributes:
        name: Module path.
        before: Rank it had.
        rank: Rank it has, 0 if it was dropped.
        frobenius: Norm of the delta before (weighted by data, if the spectra are).
        truncation: Norm of what truncation removed (exact, from the singular values; weighted
            likewise).
        delta_norm: Norm of the delta before, never weighted.
        cast: Norm of what rounding to the stored dtype changed (measured).
    """

    name: str
    before: int
    rank: int
    frobenius: float
    truncation: float
    delta_norm: float
    cast: float


@dataclass(frozen=True, repr=False)
class ResizeReport(Report):
    """What a resize did.

    Attributes:
        plan: The ranks and the rule they came from.
        modules: One entry per module.
        out: The directory written, None for a result in memory.
        output: What was written: names, headers, size.
    """

    plan: RankPlan
    modules: tuple[ResizedModule, ...]
    out: str | None
    output: OutputPlan

    @property
    def num_bytes(self) -> int:
        """Size of the weights."""
        return self.output.num_bytes

    @property
    def dtype(self) -> str:
        """Safetensors dtype code of the factors."""
        return self.output.dtype

    @property
    def truncation(self) -> float:
        """Truncation error of all modules together, relative to their norm."""
        return _relative([(m.truncation, m.frobenius) for m in self.modules])

    @property
    def cast(self) -> float:
        """Rounding error of all modules together, relative to their norm."""
        return _relative([(m.cast, m.delta_norm) for m in self.modules])

    def summary(self) -> Summary:
        """Rule, parameters, and both errors."""
        facts = [
            *self.plan.summary().facts,
            ("truncation", f"{100 * self.truncation:.2g} % of the norm"),
            ("rounding", f"{100 * self.cast:.2g} % of the norm, {self.dtype}"),
        ]
        return Summary("Resize report", (*facts, *([("written to", self.out)] if self.out else [])))

    def rows(self) -> list[dict[str, Any]]:
        """One row per module."""
        return [dict(m.__dict__) for m in self.modules]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "schema": 1,
            "out": self.out,
            "bytes": self.num_bytes,
            "dtype": self.dtype,
            "truncation_error": self.truncation,
            "cast_error": self.cast,
            "plan": self.plan.to_dict(),
            "modules": [dict(m.__dict__) for m in self.modules],
        }


@dataclass(frozen=True, eq=False, repr=False)
class ResizePlan(Plan[MadeAdapter[ResizeReport]]):
    """New ranks of an adapter, and what will be written; modules of rank 0 are left out.

    Attributes:
        adapter: The adapter.
        spectra: Its spectra, with cores kept.
        ranks: The new ranks.
        output: Names and headers of the result.
    """

    adapter: Adapter
    spectra: AdapterSpectra
    ranks: RankPlan
    output: OutputPlan

    @property
    def notes(self) -> tuple[str, ...]:
        """What is odd about the adapter's files."""
        return self.adapter.notes

    def summary(self) -> Summary:
        """The ranks, and the size of the result."""
        size = ("size", f"{self.output.num_bytes:,} bytes, {self.output.dtype}")
        return Summary("Resize plan", (*self.ranks.summary().facts, size))

    def rows(self) -> list[dict[str, Any]]:
        """One row per module."""
        return self.ranks.rows()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"schema": 1, "plan": self.ranks.to_dict(), "bytes": self.output.num_bytes}

    def _run(self, how: How) -> MadeAdapter[ResizeReport]:
        """The adapter with new ranks."""
        step = how.step("writing", len(self.ranks.ranks))

        def fill(writer: Writer) -> ResizeReport:
            done = _fill(writer, self, how.jobs, step)
            return ResizeReport(self.ranks, done, how.place, self.output)

        return make(
            self.output,
            fill,
            lambda _: {"README.md": _card(self.adapter, self.ranks)},
            out=how.out,
            name=self.adapter.name,
            force=how.force,
            inputs=self.adapter.files,
        )


def plan_resize(
    adapter: Adapter,
    spectra: AdapterSpectra,
    ranks: RankPlan,
    *,
    dtype: str | None = None,
    layout: RankLayout = "per-module",
) -> ResizePlan:
    """Decide names and headers of the result.

    Args:
        adapter: The adapter.
        spectra: Its spectra, of all modules, with cores kept.
        ranks: New ranks.
        dtype: safetensors dtype code; default: the one most modules have now.
        layout: "per-module" writes rank_pattern; "uniform" pads with zeros.

    Raises:
        AdapterError: If a module is not finite.
        MethodError: If every module would be dropped.
    """
    require_finite(spectra)
    kept = {name: rank for name, rank in ranks.ranks.items() if rank > 0}
    if not kept:
        raise MethodError(
            f"{adapter.name}: no module would be left", "leave drop_empty out, or keep more"
        )
    biased = [name for name in set(ranks.ranks) - set(kept) if adapter.modules[name].key_bias]
    if biased:
        raise MethodError(
            f"{adapter.name}: {min(biased)} has a bias on B, which rank 0 would lose",
            "leave drop_empty out",
        )
    output = plan_output(
        [adapter],
        [AlignedModule(name, {0: adapter.modules[name]}) for name in kept],
        kept,
        dtype=dtype or commonest_dtype(spec.dtype for spec in adapter.modules.values()),
        layout=layout,
        extras={name: (e.dtype, e.shape) for name, e in adapter.extras.items()},
        file_format=format_of([adapter]),
    )
    return ResizePlan(adapter, spectra, ranks, output)


def _fill(
    writer: Writer, plan: ResizePlan, jobs: int | None, step: Callable[[], None]
) -> tuple[ResizedModule, ...]:
    adapter = plan.adapter
    cores: dict[str, list[ModuleSpectrum]] = {}
    for module in plan.spectra.modules:
        cores.setdefault(module.module, []).append(module)
    done: list[ResizedModule] = []

    def one(name: str) -> ResizedModule:
        return _resize_module(adapter, cores[name], plan.ranks, writer.plan, writer)

    for result in in_order(one, list(plan.ranks.ranks), jobs=jobs):
        done.append(result)
        step()
    for name in writer.plan.extras:
        writer.add_extra(name, adapter.read_extra(name))
    return tuple(done)


def truncated(module: ModuleSpectrum, up: Tensor, down: Tensor, rank: int) -> RankStack:
    """Best approximation of a module's delta as a stack of `rank` balanced singular units.

    Args:
        module: Its spectrum, with the core kept.
        up: B, shape (d_out, r).
        down: A, shape (r, d_in).
        rank: Directions to keep.
    """
    assert module.core is not None
    left, right = module.core.truncate(rank)
    root = abs(module.spec.scaling) ** 0.5
    precise = torch.float64 if up.dtype == torch.float64 else torch.float32
    new_up = up.to(precise) @ (root * left).to(precise)
    new_down = (root * right).to(precise) @ down.to(precise)
    sign = pivot_sign(new_up)
    flip = -sign if module.spec.scaling < 0 else sign
    return RankStack.single(new_up * flip, sign.mT * new_down)


def cast_error(stack: RankStack, dtype: torch.dtype) -> float:
    """Frobenius norm of what rounding the balanced factors to a dtype changes, exactly.

    B'A' - BA = (B' - B) A' + B (A' - A): the difference is never taken between two products, so
    nothing cancels.
    """
    a, b = stack.balanced()
    rounded_a, rounded_b = a.to(dtype).to(a.dtype), b.to(dtype).to(b.dtype)
    if torch.equal(a, rounded_a) and torch.equal(b, rounded_b):
        return 0.0
    up = torch.cat([rounded_b - b, b], dim=1)
    down = torch.cat([rounded_a, rounded_a - a])
    return sqrt(max(float((gram(up.mT) * gram(down)).sum()), 0.0))


def _resize_module(
    adapter: Adapter,
    experts: Sequence[ModuleSpectrum],
    plan: RankPlan,
    output: OutputPlan,
    writer: Writer,
) -> ResizedModule:
    spec = experts[0].spec
    rank = plan.ranks[spec.name]
    total = sum(float(m.values.square().sum()) for m in experts)
    lost = sum(float(m.values[rank:].square().sum()) for m in experts)
    stacks: list[RankStack] = []
    if keeps_stored_units(plan.rule):
        stacks, dropped = split_units(adapter, spec.name, plan.rule, rank)
        lost = sum(stack.inner(stack) for stack in dropped)
    elif rank:
        a, b = adapter.read(spec.name)
        for index, module in enumerate(experts):
            down, up = to_matrix(spec, a, b, index)
            stacks.append(truncated(module, up, down, rank))
    cast = 0.0
    if rank:
        cast = sum(cast_error(stack, DTYPES[output.dtype]) ** 2 for stack in stacks)
        writer.add(spec.name, stacks, adapter.read_bias(spec.name))
    norm = (
        total if experts[0].delta_norm is None else sum((m.delta_norm or 0) ** 2 for m in experts)
    )
    before = plan.modules[spec.name].before
    return ResizedModule(spec.name, before, rank, sqrt(total), sqrt(lost), sqrt(norm), sqrt(cast))


def _relative(parts: Sequence[tuple[float, float]]) -> float:
    """Norm of all errors over the norm of all deltas, 0 of nothing."""
    total = sum(whole**2 for _, whole in parts)
    return sqrt(sum(error**2 for error, _ in parts) / total) if total > 0 else 0.0


def _card(adapter: Adapter, plan: RankPlan) -> str:
    low, high = min(plan.ranks.values()), max(plan.ranks.values())
    return short_card(
        "A resized LoRA adapter",
        adapter.config.base_model,
        f"{code(adapter.name)} at lower rank: rule `{plan.rule}`, ranks {low} to {high}, "
        f"{100 * plan.energy:.2f} % of the energy kept.\n\n"
        "The scaling is folded into the weights (`lora_alpha` = `r`).",
    )
