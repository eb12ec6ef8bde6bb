"""A LoRA from two full checkpoints: the leading part of every weight's difference.

Weights are subtracted in float32, one at a time. Differences of 16-bit checkpoints are signal plus
rounding noise of full rank, so the threshold of Gavish & Donoho (2014) caps the rank; rank rules
choose below it.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_merge.adapters.adapter import Adapter
from lora_merge.adapters.aligned_module import AlignedModule
from lora_merge.adapters.config import AdapterConfig, RankLayout
from lora_merge.adapters.forms import ModuleSpec
from lora_merge.adapters.rank_stack import RankStack
from lora_merge.adapters.units import Recipe
from lora_merge.adapters.writer import AdapterWriter, OutputPlan, plan_output
from lora_merge.errors import MethodError
from lora_merge.files.atomic import atomic_directory
from lora_merge.files.cards import short_card
from lora_merge.files.checkpoint import Checkpoint
from lora_merge.files.targets import check_target
from lora_merge.files.tensor_file import LARGEST_ENTRY, TensorDict, commonest_dtype
from lora_merge.linalg.factors import frobenius
from lora_merge.linalg.range_finder import leading_svd
from lora_merge.machine.parallel import in_order
from lora_merge.printing import Report, Summary
from lora_merge.ranks.choose import RankPlan, choose_ranks
from lora_merge.ranks.rule import RankRule
from lora_merge.reshape.coverage import Coverage, measured, survey
from lora_merge.reshape.noise import noise_rank


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
        out: The directory written.
        num_bytes: Size of the weights.
    """

    plan: RankPlan
    coverage: tuple[Coverage, ...]
    capped: tuple[str, ...]
    out: str
    num_bytes: int

    def summary(self) -> Summary:
        """Ranks, energy, and what was not extracted."""
        counts = Counter(entry.what for entry in self.coverage)
        facts = [
            *self.plan.summary().facts,
            *((what, f"{count} tensors") for what, count in counts.items()),
            ("capped", f"{len(self.capped)} ranks, at the noise threshold"),
            ("written to", self.out),
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


def extract(
    base: Checkpoint,
    tuned: Checkpoint,
    out: Path,
    rule: RankRule | str = "energy:0.95",
    *,
    max_rank: int = 64,
    denoise: bool = True,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    base_model: str | None = None,
    dtype: str | None = None,
    layout: RankLayout = "uniform",
    seed: int = 0,
    force: bool = False,
    jobs: int | None = None,
    on_module: Callable[[], None] | None = None,
) -> ExtractReport:
    """Write a LoRA of the differences between two checkpoints.

    Args:
        base: The base model.
        tuned: The fine-tuned model.
        out: The directory to make.
        rule: How ranks are chosen; energies are of the whole difference.
        max_rank: Triples computed per weight, and the largest rank.
        denoise: Cap ranks at the Gavish-Donoho threshold.
        include: Patterns (`adapters.patterns`) of modules; default: every matrix but embeddings
            and heads.
        exclude: Patterns of modules to leave out.
        base_model: Name of the base model for the config.
        dtype: safetensors dtype code; default: that of the tuned checkpoint.
        layout: As for `plan_output`.
        seed: Of the randomised SVD.
        force: Replace an adapter directory.
        jobs: Worker threads.
        on_module: Called after each weight.

    Raises:
        MethodError: If no weight has changed, or none can be extracted.
        OutputError: If the directory cannot be written.
    """
    inputs = [*base.paths, *tuned.paths]
    check_target(out, force=force, inputs=inputs)
    names, others = survey(base, tuned, include=include, exclude=exclude)
    if not names:
        raise MethodError(
            "the checkpoints have no matrix of the same name and shape"
            + (" among those to extract" if include or exclude else ""),
            "check both directories" + (", --include and --exclude" if include or exclude else ""),
        )
    coverage = [measured(base, tuned, one) for one in others]
    parts: dict[str, Difference] = {}

    def one(name: str) -> Difference | Coverage:
        return _difference(base, tuned, name, max_rank, denoise, seed)

    for name, found in zip(names, in_order(one, names, jobs=jobs), strict=True):
        if isinstance(found, Coverage):
            coverage.append(found)
        else:
            parts[found.spec.name] = found
            coverage.append(Coverage(name, "extracted", found.relative_change))
        if on_module:
            on_module()
    if not parts:
        raise MethodError("no weight differs between the checkpoints", "check both directories")
    plan, capped = _choose(parts, rule, denoise)
    config = AdapterConfig(
        base_model=base_model,
        r=None,
        target_modules=tuple(sorted(parts)),
        fan_in_fan_out=any(map(base.is_conv1d, parts)),
    )
    specs = {name: part.spec for name, part in parts.items()}
    output = plan_output(
        [Adapter("extracted", config, specs, {}, TensorDict({}))],
        [AlignedModule(name, {0: spec}) for name, spec in specs.items()],
        plan.ranks,
        dtype=dtype or commonest_dtype(spec.dtype for spec in specs.values()),
        layout=layout,
    )
    needed = output.num_bytes
    with atomic_directory(out, force=force, inputs=inputs, needed=needed) as folder:
        _write(parts, plan, output, folder)
    ordered = tuple(sorted(coverage, key=lambda c: c.name))
    return ExtractReport(plan, ordered, capped, str(out), output.num_bytes)


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


def _difference(
    base: Checkpoint,
    tuned: Checkpoint,
    name: str,
    max_rank: int,
    denoise: bool,
    seed: int,
) -> Difference | Coverage:
    module = name.removesuffix(".weight")
    before, after = base.read(name).float(), tuned.read(name).float()
    delta = (after - before).mT if base.is_conv1d(module) else after - before
    norm, base_norm = frobenius(delta), frobenius(before)
    if not norm <= LARGEST_ENTRY:
        return Coverage(name, "not finite", None)
    if norm == 0:
        return Coverage(name, "unchanged", 0.0)
    leading = leading_svd(delta, min(max_rank, *delta.shape), seed=seed)
    cap = noise_rank(delta, leading.s, leading.residual) if denoise else len(leading.s)
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


def _write(
    parts: Mapping[str, Difference], plan: RankPlan, output: OutputPlan, folder: Path
) -> None:
    with AdapterWriter(folder, output) as writer:
        for name, part in parts.items():
            rank = plan.ranks[name]
            root = part.values[:rank].sqrt().float()
            up, down = part.u[:, :rank] * root, root[:, None] * part.vh[:rank]
            writer.add(name, [RankStack.single(up, down)])
    text = short_card(
        "An extracted LoRA adapter",
        output.config["base_model_name_or_path"],
        f"The leading part of the difference between two checkpoints: rule `{plan.rule}`, "
        f"{100 * plan.energy:.2f} % of the squared difference of {len(parts)} weights.",
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
