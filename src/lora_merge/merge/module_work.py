"""What a plan does with one module: how its numbers are kept, searched, and how many they are."""

from collections.abc import Mapping
from typing import Protocol

import torch

from lora_merge.adapters.aligned_module import AlignedModule
from lora_merge.adapters.alignment import Alignment
from lora_merge.files.tensor_file import DTYPES
from lora_merge.linalg.range_finder import is_worth_it
from lora_merge.linalg.unit_sums import LARGEST_GRAM
from lora_merge.merge.elementwise.delta import working_bytes
from lora_merge.merge.methods.method import Method
from lora_merge.merge.recipe.recipe import Semantics
from lora_merge.ranks.rule import RankRule


class Planned(Protocol):
    """What of a plan these questions are about."""

    @property
    def alignment(self) -> Alignment:
        """The adapters and their modules."""
        ...

    @property
    def method(self) -> Method:
        """The method."""
        ...

    @property
    def semantics(self) -> Semantics:
        """What all methods share."""
        ...

    @property
    def rule(self) -> RankRule:
        """How ranks are chosen."""
        ...

    @property
    def ranks(self) -> Mapping[str, int]:
        """Rank of each module's result."""
        ...


def searches(plan: Planned, module: AlignedModule) -> bool:
    """Whether a module's result is cut by a search for its leading directions alone."""
    if plan.semantics.exact or plan.rule.kind != "fixed":
        return False
    if plan.method.makes_rank and not plan.method.searches:
        return False
    return is_worth_it(module.num_units, plan.ranks[module.name])


def only_sums(plan: Planned, module: AlignedModule) -> bool:
    """Whether it is all that happens to a module that its units are summed and searched."""
    how = plan.semantics
    plain = plan.method.sums and not (how.svc or how.pico or how.smooth != "none")
    return plain and searches(plan, module)


def gram_dtype(plan: Planned, module: AlignedModule) -> torch.dtype | None:
    """Precision of the inner products of all units of a module; None where none are needed."""
    if only_sums(plan, module):
        return None if _many(plan, module) else torch.float32
    how = plan.semantics
    turned = (how.space or plan.method.space) in ("aligned", "core")
    turned = turned or how.svc or how.pico or how.smooth != "none"
    needed = turned or plan.method.grams or not _many(plan, module)
    return torch.float64 if needed else None


def stack_dtype(plan: Planned, module: AlignedModule) -> torch.dtype:
    """How a module's stack is kept: as stored where its units are only multiplied with."""
    stored = {spec.dtype for spec in module.specs.values()}
    as_stored = only_sums(plan, module) and _many(plan, module) and stored == {"BF16"}
    return torch.bfloat16 if as_stored else torch.float32


def _many(plan: Planned, module: AlignedModule) -> bool:
    return not plan.semantics.exact and module.num_units > LARGEST_GRAM


def module_bytes(plan: Planned, module: AlignedModule) -> int:
    """Estimated working memory of one module in bytes."""
    stored = sum(s.num_parameters * DTYPES[s.dtype].itemsize for s in module.specs.values())
    result = module.stack_bytes() * plan.ranks[module.name] // module.num_units
    stack = module.stack_bytes(stack_dtype(plan, module).itemsize)
    grams = 0 if gram_dtype(plan, module) is None else 4 * 8 * module.num_units**2
    total = stored + stack + 2 * result + grams
    if (plan.semantics.space or plan.method.space) in plan.method.full_rank_in:
        total += working_bytes(module.first.d_out, module.first.d_in, len(module.specs))
    return total


def work_notes(plan: Planned) -> list[str]:
    """Where results are not decomposed whole."""
    notes = []
    many = [m for m in plan.alignment.modules if gram_dtype(plan, m) is None]
    if many:
        notes.append(
            f"norms of the exact sums of {len(many)} modules of more than {LARGEST_GRAM} units are "
            "estimates; the report has their standard errors; --exact measures them"
        )
    searched = [m for m in plan.alignment.modules if searches(plan, m)]
    if not searched:
        return notes
    units, ranks = max(m.num_units for m in searched), max(plan.ranks[m.name] for m in searched)
    return [
        *notes,
        f"{len(searched)} modules of up to {units} units are cut to rank {ranks} by a search for "
        "their leading directions, within 0.1 % of the exact cut's energy; --exact decomposes them",
    ]
