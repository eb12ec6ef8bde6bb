"""A LoRA from two full checkpoints: the leading part of every weight's difference.

Weights are subtracted in float32, one at a time. Differences of 16-bit checkpoints are signal plus
rounding noise of full rank, so the threshold of Gavish & Donoho (2014) caps the rank; rank rules
choose below it.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_merge.adapters.adapter import Adapter
from lora_merge.adapters.aligned_module import AlignedModule
from lora_merge.adapters.config import AdapterConfig
from lora_merge.adapters.forms import ModuleSpec
from lora_merge.adapters.in_memory import MadeAdapter, make
from lora_merge.adapters.rank_stack import RankStack
from lora_merge.adapters.units import Recipe
from lora_merge.adapters.writer import OutputPlan, Writer, plan_output
from lora_merge.errors import MethodError
from lora_merge.files.checkpoint import Checkpoint
from lora_merge.files.header import code_of
from lora_merge.files.pages.cards import short_card
from lora_merge.files.targets import check_target
from lora_merge.files.tensor_file import LARGEST_ENTRY, TensorDict, commonest_dtype
from lora_merge.linalg.factors import frobenius
from lora_merge.linalg.range_finder import leading_svd
from lora_merge.machine.parallel import in_order
from lora_merge.planning import How, Plan
from lora_merge.printing import Report, Summary
from lora_merge.ranks.choose import RankPlan, choose_ranks
from lora_merge.ranks.rule import RankRule
from lora_merge.reshape.coverage import Coverage, measured, survey
from lora_merge.reshape.noise import noise_rank
from lora_merge.reshape.options import ExtractOptions


@dataclass(frozen=True, eq=False)
class Difference:
    """The leading part of one weight's difference.

    Attributes:
        spec: The module it becomes.
        u: Shape (d_out, k), float32.
        values: Leading singular values, float64, shape (k,).
        vh: Shape (k, d_in), float32.
        frobenius: Norm of the whole difference.
        relative_change: That over the norm of the base weight, None where this is zero.
        residual: Norm of what the k triples leave, exact.
        noise_rank: Values above the Gavish-Donoho threshold; all of them where it is not used.
    """

    spec: ModuleSpec
    u: Tensor
    values: Tensor
    vh: Tensor
    frobenius: float
    relative_change: float | None
    residual: float
    noise_rank: int


@dataclass(frozen=True, repr=False)
class ExtractReport(Report):
    """What an extraction did.

    Attributes:
        plan: The ranks; energies are relative to the whole differences.
        coverage: Every tensor of both checkpoints.
        capped: Modules whose rank the noise threshold lowered.
        out: The directory written, None for a result in memory.
        num_bytes: Size of the weights.
    """

    plan: RankPlan
    coverage: tuple[Coverage, ...]
    capped: tuple[str, ...]
    out: str | None
    num_bytes: int

    def summary(self) -> Summary:
        """Ranks, energy, and what was not extracted."""
        counts = Counter(entry.what for entry in self.coverage)
        facts = [
            *self.plan.summary().facts,
            *((what, f"{count} tensors") for what, count in counts.items()),
            ("capped", f"{len(self.capped)} ranks, at the noise threshold"),
            *([("written to", self.out)] if self.out else []),
        ]
        return Summary("Extract report", tuple(facts))

    def rows(self) -> list[dict[str, Any]]:
        """One row per tensor of either checkpoint."""
        return [dict(entry.__dict__) for entry in self.coverage]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "schema": 1,
            "out": self.out,
            "bytes": self.num_bytes,
            "capped": list(self.capped),
            "plan": self.plan.to_dict(),
            "coverage": [dict(c.__dict__) for c in self.coverage],
        }


@dataclass(frozen=True, eq=False, repr=False)
class ExtractPlan(Plan[MadeAdapter[ExtractReport]]):
    """Which weights of two checkpoints will be compared; how they differ shows when it runs.

    Attributes:
        base: The base model.
        tuned: The fine-tuned model.
        names: The weights.
        others: Every other tensor, and why it is left out.
        rule: How ranks are chosen.
        options: How much is taken.
    """

    base: Checkpoint
    tuned: Checkpoint
    names: tuple[str, ...]
    others: tuple[Coverage, ...]
    rule: RankRule | str
    options: ExtractOptions

    def summary(self) -> Summary:
        """How many weights are compared, and what is not."""
        counts = Counter(entry.what for entry in self.others)
        facts = [("weights", f"{len(self.names)} are compared"), ("rule", str(self.rule))]
        return Summary("Extract plan", (*facts, *((w, f"{n} tensors") for w, n in counts.items())))

    def rows(self) -> list[dict[str, Any]]:
        """One row per tensor of either checkpoint."""
        compared = [{"name": name, "what": "compared", "change": None} for name in self.names]
        return [*compared, *(dict(entry.__dict__) for entry in self.others)]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"schema": 1, "rule": str(self.rule), "tensors": self.rows()}

    def _run(self, how: How) -> MadeAdapter[ExtractReport]:
        """The LoRA of the differences.

        Raises:
            MethodError: If no weight has changed.
            OutputError: If the directory cannot be written.
        """
        inputs = [*self.base.paths, *self.tuned.paths]
        if how.out is not None:
            check_target(how.out, force=how.force, inputs=inputs)
        parts, coverage = self._compared(how.jobs, how.step("extracting", len(self.names)))
        ranks, capped = _choose(parts, self.rule, self.options.denoise)
        output = self._output(parts, ranks)

        def fill(writer: Writer) -> ExtractReport:
            for name, part in parts.items():
                root = part.values[: ranks.ranks[name]].sqrt().float()
                up, down = part.u[:, : len(root)] * root, root[:, None] * part.vh[: len(root)]
                writer.add(name, [RankStack.single(up, down)])
            return ExtractReport(ranks, coverage, capped, how.place, output.num_bytes)

        return make(
            output,
            fill,
            lambda _: {"README.md": _card(ranks, output)},
            out=how.out,
            name="extracted",
            force=how.force,
            inputs=inputs,
        )

    def _compared(
        self, jobs: int | None, step: Callable[[], None]
    ) -> tuple[dict[str, Difference], tuple[Coverage, ...]]:
        """The weights that differ, and every tensor with what became of it."""
        coverage = [measured(self.base, self.tuned, one) for one in self.others]
        parts: dict[str, Difference] = {}
        compare = partial(_difference, self.base, self.tuned, self.options)
        for name, found in zip(
            self.names, in_order(compare, list(self.names), jobs=jobs), strict=True
        ):
            if isinstance(found, Coverage):
                coverage.append(found)
            else:
                parts[found.spec.name] = found
                coverage.append(Coverage(name, "extracted", found.relative_change))
            step()
        if not parts:
            raise MethodError("no weight differs between the checkpoints", "check both directories")
        return parts, tuple(sorted(coverage, key=lambda c: c.name))

    def _output(self, parts: Mapping[str, Difference], ranks: RankPlan) -> OutputPlan:
        config = AdapterConfig(
            base_model=self.options.base_name or _called(self.base.folder),
            r=None,
            target_modules=tuple(sorted(parts)),
            fan_in_fan_out=any(map(self.base.is_conv1d, parts)),
        )
        specs = {name: part.spec for name, part in parts.items()}
        dtype = code_of(self.options.dtype)
        return plan_output(
            [Adapter("extracted", config, specs, {}, TensorDict({}))],
            [AlignedModule(name, {0: spec}) for name, spec in specs.items()],
            ranks.ranks,
            dtype=dtype or commonest_dtype(spec.dtype for spec in specs.values()),
            layout=self.options.layout,
        )


def plan_extract(
    base: Checkpoint,
    tuned: Checkpoint,
    rule: RankRule | str = "energy:0.95",
    options: ExtractOptions | None = None,
) -> ExtractPlan:
    """Decide from headers which weights are compared.

    Args:
        base: The base model.
        tuned: The fine-tuned model.
        rule: How ranks are chosen; energies are of the whole difference.
        options: How much is taken.

    Raises:
        MethodError: If none can be extracted.
    """
    options = options or ExtractOptions()
    names, others = survey(base, tuned, include=options.include, exclude=options.exclude)
    if not names:
        some = bool(options.include or options.exclude)
        raise MethodError(
            "the checkpoints have no matrix of the same name and shape"
            + (" among those to extract" if some else ""),
            "check both directories" + (", include and exclude" if some else ""),
        )
    return ExtractPlan(base, tuned, tuple(names), tuple(others), rule, options)


def _choose(
    parts: Mapping[str, Difference], rule: RankRule | str, denoise: bool
) -> tuple[RankPlan, tuple[str, ...]]:
    """Ranks from spectra completed by their unseen tail, then the noise cap."""
    spectra, costs, before = {}, {}, {}
    for name, part in parts.items():
        values = part.values
        hidden = min(part.spec.d_out, part.spec.d_in) - len(values)
        if hidden > 0:
            # Energy rules must count the tail: spread evenly, since only its norm is known.
            # It cannot be kept, since `before` ends at the computed values.
            share = min(part.residual / math.sqrt(hidden), float(values[-1]))
            values = torch.cat([values, torch.full((hidden,), share, dtype=torch.float64)])
        spectra[name] = values
        costs[name] = part.spec.d_in + part.spec.d_out
        before[name] = part.spec.rank
    plan = choose_ranks(spectra, costs, rule, before=before)
    if not denoise:
        return plan, ()
    capped = tuple(n for n, r in plan.ranks.items() if r > max(parts[n].noise_rank, 1))
    if not capped:
        return plan, ()
    limits = {n: min(r, max(parts[n].noise_rank, 1)) for n, r in plan.ranks.items()}
    lowered = {}
    for name, rank in limits.items():
        one = choose_ranks(
            {name: spectra[name]}, {name: costs[name]}, str(rank), before={name: before[name]}
        )
        lowered[name] = one.modules[name]
    return RankPlan(plan.rule, lowered, None, plan.threshold), capped


def _called(folder: Path) -> str:
    """What an adapter trained on a directory calls it: the path as it was given, below here."""
    if folder.is_absolute() or ".." in folder.parts or not folder.parts:
        return folder.resolve().name
    return folder.as_posix()


def _difference(
    base: Checkpoint, tuned: Checkpoint, options: ExtractOptions, name: str
) -> Difference | Coverage:
    module = name.removesuffix(".weight")
    before, after = base.read(name).float(), tuned.read(name).float()
    delta = (after - before).mT if base.is_conv1d(module) else after - before
    norm, base_norm = frobenius(delta), frobenius(before)
    if not norm <= LARGEST_ENTRY:
        return Coverage(name, "not finite", None)
    if norm == 0:
        return Coverage(name, "unchanged", 0.0)
    leading = leading_svd(delta, min(options.max_rank, *delta.shape), seed=options.seed)
    cap = len(leading.s)
    if options.denoise:
        cap = noise_rank(delta, leading.s, leading.residual)
    spec = ModuleSpec(
        name=module,
        form="linear",
        d_out=delta.shape[0],
        d_in=delta.shape[1],
        rank=len(leading.s),
        scaling=1.0,
        dtype=tuned.tensors[name].dtype,
        recipe=Recipe(()),
    )
    return Difference(
        spec=spec,
        u=leading.u,
        values=leading.s,
        vh=leading.vh,
        frobenius=norm,
        relative_change=norm / base_norm if base_norm > 0 else None,
        residual=math.sqrt(leading.residual),
        noise_rank=cap,
    )


def _card(ranks: RankPlan, output: OutputPlan) -> str:
    return short_card(
        "An extracted LoRA adapter",
        output.config["base_model_name_or_path"],
        f"The leading part of the difference between two checkpoints: rule `{ranks.rule}`, "
        f"{100 * ranks.energy:.2f} % of the squared difference of {len(ranks.modules)} weights.",
    )
