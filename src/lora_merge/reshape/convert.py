"""One adapter from any dialect to any file format: exact, or cut with the error stated."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_merge.adapters.adapter import Adapter
from lora_merge.adapters.aligned_module import AlignedModule
from lora_merge.adapters.base_weights import CheckpointBase
from lora_merge.adapters.formats.file_format import FileFormat
from lora_merge.adapters.formats.table import FORMATS, format_of
from lora_merge.adapters.forms import ModuleSpec, to_matrix
from lora_merge.adapters.identity.expert_choice import in_layout, peft_of
from lora_merge.adapters.in_memory import MadeAdapter, make
from lora_merge.adapters.rank_stack import RankStack
from lora_merge.adapters.units import Verdict
from lora_merge.adapters.writer import NEW_EXPERTS, OutputPlan, Writer, plan_output
from lora_merge.errors import MethodError
from lora_merge.files.checkpoint import Checkpoint
from lora_merge.files.header import code_of
from lora_merge.files.pages.cards import code, short_card
from lora_merge.files.targets import check_target
from lora_merge.files.tensor_file import commonest_dtype, refuse_non_finite
from lora_merge.linalg.core_svd import CoreSVD, core_svd
from lora_merge.linalg.factors import pivot_sign
from lora_merge.machine.parallel import in_order
from lora_merge.planning import How, Plan
from lora_merge.printing import Report, Summary
from lora_merge.printing import notes as noted
from lora_merge.reshape.diffusers_names import through_diffusers
from lora_merge.reshape.module_renames import renamed
from lora_merge.reshape.options import ConvertOptions

# Share of a squared norm below which singular values in float64 are rounding.
_ROUNDING = 1e-13


@dataclass(frozen=True)
class ConvertedModule:
    """One module.

    Attributes:
        name: Its name in the result.
        verdict: How exact its form is.
        units: Units that its form has.
        rank: Units that are written.
        norm: Frobenius norm of its delta; None where nothing was cut, so that it was not measured.
        lost: Norm of what the cut took away.
    """

    name: str
    verdict: Verdict
    units: int
    rank: int
    norm: float | None = None
    lost: float = 0.0


@dataclass(frozen=True, repr=False)
class ConvertReport(Report):
    """What a conversion did.

    Attributes:
        dialect: What the adapter was read as.
        target: The format that was written.
        modules: One entry per module.
        out: The directory, None for a plan.
        num_bytes: Size of the weights.
        dtype: safetensors dtype code of the factors.
        notes: What the reader understood that a user should know.
    """

    dialect: str
    target: str
    modules: tuple[ConvertedModule, ...]
    out: str | None
    num_bytes: int
    dtype: str
    notes: tuple[str, ...]

    @property
    def error(self) -> float:
        """Norm of all that was cut over the norm of all deltas that were cut; 0 if none was."""
        total = sum((m.norm or 0.0) ** 2 for m in self.modules)
        return sqrt(sum(m.lost**2 for m in self.modules) / total) if total else 0.0

    def summary(self) -> Summary:
        """From what to what, how exactly, and where it lies."""
        verdicts = Counter(m.verdict for m in self.modules)
        facts = [
            ("from", self.dialect),
            ("to", f"{self.target}, {self.num_bytes:,} bytes, {self.dtype}"),
            *((verdict, f"{count} modules") for verdict, count in verdicts.items()),
        ]
        if self.error:
            facts.append(("cut", f"{100 * self.error:.3g} % of the norm"))
        if self.out:
            facts.append(("written to", self.out))
        return Summary("Conversion", (*facts, *noted(self.notes)))

    def rows(self) -> list[dict[str, Any]]:
        """One row per module."""
        return [dict(m.__dict__) for m in self.modules]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "schema": 1,
            "dialect": self.dialect,
            "to": self.target,
            "out": self.out,
            "bytes": self.num_bytes,
            "dtype": self.dtype,
            "error": self.error,
            "notes": list(self.notes),
            "modules": self.rows(),
        }


@dataclass(frozen=True, eq=False, repr=False)
class ConversionPlan(Plan[MadeAdapter[ConvertReport]]):
    """A conversion that was checked from headers and not yet done.

    Attributes:
        adapter: The adapter under its new names.
        dialect: What it was read as.
        target: The format that is written.
        ranks: Rank of every module's result.
        dtype: safetensors dtype code of the factors.
        energy: Share of the squared norm that is kept, None where the ranks decide.
        peft_version: The PEFT that stores experts as the result does.
    """

    adapter: Adapter
    dialect: str
    target: FileFormat
    ranks: Mapping[str, int]
    dtype: str
    energy: float | None = None
    peft_version: str = NEW_EXPERTS

    @cached_property
    def output(self) -> OutputPlan:
        """What is written: one rank for all modules, padded with zeros.

        Raises:
            AdapterError: If the format cannot hold it.
        """
        adapter = self.adapter
        return plan_output(
            [adapter],
            [AlignedModule(name, {0: spec}) for name, spec in adapter.modules.items()],
            self.ranks,
            dtype=self.dtype,
            extras={name: (extra.dtype, extra.shape) for name, extra in adapter.extras.items()},
            file_format=self.target,
            peft_version=self.peft_version,
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """What the reader understood that a user should know."""
        return self.adapter.notes

    def summary(self) -> Summary:
        """That of its report."""
        return replace(self.report().summary(), title="Conversion plan")

    def rows(self) -> list[dict[str, Any]]:
        """One row per module."""
        return self.report().rows()

    def to_dict(self) -> dict[str, Any]:
        """As its report."""
        return self.report().to_dict()

    def _run(self, how: How) -> MadeAdapter[ConvertReport]:
        """The adapter in its new form."""
        if how.out is not None:
            check_target(how.out, force=how.force, inputs=self.adapter.files)
        plan = self if self.energy is None else _with_energy(self, how.jobs)
        step = how.step("converting", len(plan.ranks))

        def fill(writer: Writer) -> ConvertReport:
            done = []
            for result in in_order(
                partial(_convert_module, plan, writer), list(plan.ranks), jobs=how.jobs
            ):
                done.append(result)
                step()
            for name in plan.adapter.extras:
                writer.add_extra(name, plan.adapter.read_extra(name))
            return plan.report(tuple(done), how.out)

        return make(
            plan.output,
            fill,
            lambda report: {"README.md": _card(plan, report)},
            out=how.out,
            name=plan.adapter.name,
            force=how.force,
            inputs=plan.adapter.files,
        )

    def report(
        self, modules: tuple[ConvertedModule, ...] | None = None, out: Path | None = None
    ) -> ConvertReport:
        """The report; without `modules` of what is planned."""
        if modules is None:
            modules = tuple(
                ConvertedModule(name, spec.recipe.verdict, spec.rank, self.ranks[name])
                for name, spec in self.adapter.modules.items()
            )
        return ConvertReport(
            self.dialect,
            self.target.name,
            modules,
            None if out is None else str(out),
            self.output.num_bytes,
            self.dtype,
            self.adapter.notes,
        )


def plan_conversion(
    adapter: Adapter,
    options: ConvertOptions | None = None,
    *,
    base: Checkpoint | None = None,
) -> ConversionPlan:
    """Decide names, ranks and headers of a conversion, from headers alone.

    Args:
        adapter: As opened; with base and rank where its form needs them.
        options: What to make.
        base: The base model, where names depend on it.

    Raises:
        AdapterError: If no rule leads to the format's names, or it cannot hold the adapter.
        MethodError: If there is no such format.
    """
    options = options or ConvertOptions()
    target = format_of([adapter]) if options.to is None else _format(options.to)
    dialect = adapter.dialect
    if options.pipeline is not None:
        adapter = through_diffusers(adapter, options.pipeline, base=base)
    if options.experts is not None:
        model = None if base is None else CheckpointBase(base)
        names = () if base is None else base.tensors
        adapter = in_layout(adapter, options.experts, names, model)
    adapter = renamed(adapter, target, component=options.component, base=base)
    ranks = {
        name: min(spec.rank, spec.d_in, spec.d_out, options.rank or spec.rank)
        for name, spec in adapter.modules.items()
    }
    dtype = code_of(options.dtype) or commonest_dtype(s.dtype for s in adapter.modules.values())
    version = peft_of(options.experts)
    plan = ConversionPlan(adapter, dialect, target, ranks, dtype, options.energy, version)
    plan.output  # noqa: B018 - checks that the format can hold it
    return plan


def _convert_module(plan: ConversionPlan, writer: Writer, name: str) -> ConvertedModule:
    adapter, spec, rank = plan.adapter, plan.adapter.modules[name], plan.ranks[name]
    stacks, norm, lost = [], 0.0, 0.0
    for a, b in _pairs(adapter, spec):
        if rank >= spec.rank:
            stacks.append(RankStack.of([(a, b, spec.scaling)]))
            continue
        core = core_svd(b, a)
        squares = core.values.square() * spec.scaling**2
        norm += float(squares.sum())
        lost += float(squares[rank:].sum())
        stacks.append(_truncated(core, a, b, spec.scaling, rank))
    writer.add(name, stacks, adapter.read_bias(name))
    measured = sqrt(norm) if rank < spec.rank else None
    if spec.recipe.whole_norm is not None:
        # The units are the best part of the delta already, so what is missing is orthogonal to it.
        tensors = (adapter.tensors.read(key) for key in spec.recipe.keys)
        measured = spec.recipe.whole_norm(*tensors) * abs(spec.scaling)
        kept = sum(stack.inner(stack) for stack in stacks)
        lost = max(measured**2 - kept, 0.0)
    return ConvertedModule(name, spec.recipe.verdict, spec.rank, rank, measured, sqrt(lost))


def _pairs(adapter: Adapter, spec: ModuleSpec) -> list[tuple[Tensor, Tensor]]:
    """A and B of every expert, float32 at least, finite."""
    stored = adapter.read(spec.name)
    for letter, tensor in zip("AB", stored, strict=True):
        refuse_non_finite(tensor, f"{adapter.name}: {spec.name}: lora_{letter}")
    a, b = (x if x.dtype == torch.float64 else x.float() for x in stored)
    return [to_matrix(spec, a, b, expert) for expert in range(spec.num_experts)]


def _truncated(core: CoreSVD, a: Tensor, b: Tensor, scaling: float, rank: int) -> RankStack:
    """The best approximation of a rank, signs fixed."""
    left, right = core.truncate(rank)
    up, down = b @ left.to(b.dtype), right.to(a.dtype) @ a
    sign = pivot_sign(up)
    return RankStack.single(up * sign * scaling, sign.mT * down)


def _with_energy(plan: ConversionPlan, jobs: int | None) -> ConversionPlan:
    """The plan once the spectra are known: a first pass over the file."""

    def needed(name: str) -> int:
        spec = plan.adapter.modules[name]
        ranks = []
        for a, b in _pairs(plan.adapter, spec):
            squares = core_svd(b, a).values.square()
            tails = squares.flip(0).cumsum(0).flip(0)  # what is lost by a cut before each value
            allowed = max(1 - (plan.energy or 1.0), _ROUNDING) * float(tails[0])
            ranks.append(max(int((tails > allowed).sum()), 1))
        return max(ranks)

    names = list(plan.adapter.modules)
    ranks = dict(zip(names, in_order(needed, names, jobs=jobs), strict=True))
    return replace(plan, ranks=ranks)


def _format(name: str) -> FileFormat:
    if name not in FORMATS:
        raise MethodError(f"no format {name!r}", f"one of: {', '.join(FORMATS)}")
    return FORMATS[name]


def _card(plan: ConversionPlan, report: ConvertReport) -> str:
    cut = f" Cutting it lost {100 * report.error:.3g} % of its norm." if report.error else ""
    return short_card(
        "A converted LoRA adapter",
        plan.adapter.config.base_model,
        f"{code(plan.adapter.name)}, read as {report.dialect}, written for "
        f"{plan.target.title}.{cut}\n\nThe scaling is folded into the weights.",
    )
