"""Fewer experts from many: group them by how they are used, merge by usage, cut to a rank.

MC-SMoE's idea (arXiv 2310.01334) on LoRA experts: the most used experts lead, every other one joins
the leader that is active on the same tokens, a group is merged by its members' usage, and what
remains is compressed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lora_merge.adapters.alignment import align, read_stacks
from lora_merge.adapters.rank_stack import RankStack
from lora_merge.errors import MethodError
from lora_merge.mixture.expert import Expert
from lora_merge.mixture.formats.experts_in_memory import plain_adapter
from lora_merge.mixture.formats.plain import cut
from lora_merge.mixture.gates.initial import initial_gate
from lora_merge.mixture.gates.text_index import DESCRIPTORS
from lora_merge.mixture.insight.usage import Usage
from lora_merge.mixture.mixture import Mixture
from lora_merge.printing import Report, Summary


@dataclass(frozen=True, eq=False, repr=False)
class Consolidation(Report):
    """What became of a mixture.

    Attributes:
        mixture: The smaller mixture; None where one plain adapter was written in its place.
        groups: Names of the experts in each new one, leader first.
        error: Relative Frobenius error of cutting the groups to the rank, over all modules.
    """

    mixture: Mixture | None
    groups: tuple[tuple[str, ...], ...]
    error: float

    def summary(self) -> Summary:
        """Who went where, and the error of the cut."""
        facts = [(group[0], " + ".join(group)) for group in self.groups[:16]]
        error = f"{100 * self.error:.2g} % of the norm" if self.error else "none"
        title = f"Mixture of {len(self.groups)} groups" if self.mixture else "One plain adapter"
        return Summary(title, (*facts, ("cut", error)))

    def rows(self) -> list[dict[str, Any]]:
        """One row per old expert."""
        return [{"expert": name, "group": g[0]} for g in self.groups for name in g]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        groups = [list(group) for group in self.groups]
        return {"schema": 1, "groups": groups, "error": self.error}


def consolidate(
    mixture: Mixture, usage: Usage, *, experts: int, rank: int | None = None
) -> Consolidation:
    """Merge a mixture's experts into a few.

    A group's members enter with their shares of the group's usage in each module, so that the
    group's weight times the merged expert is what the members did together on average. Shares sum
    to 1, so general adapters (GenKnowSub) are subtracted from a group as from its members.

    Args:
        mixture: What there is.
        usage: How it was used on text that matters.
        experts: How many are to remain.
        rank: Largest rank of each; None keeps the members' ranks together, without error.

    Raises:
        MethodError: If the gate cannot lead groups, or the usage is of another mixture.
    """
    check_groups(mixture, experts)
    names, modules = mixture.names, mixture.gated_modules
    if tuple(names) != usage.experts or set(usage.modules) != {m.name for m in modules}:
        raise MethodError("the usage is that of another mixture", "measure this one's")
    groups = group_experts(usage, experts)
    parts: list[dict[str, RankStack]] = [{} for _ in groups]
    lost = total = 0.0
    for module in modules:
        stack = next(iter(read_stacks(mixture.alignment, module)))
        for place, group in enumerate(groups):
            merged = _merged(stack, group, usage.mean_weights()[module.name])
            if merged is None:
                continue
            part, missing = cut(merged, min(rank or merged.num_units, merged.num_units))
            lost += missing
            total += merged.inner(merged)
            parts[place][module.name] = part
    adapters = [expert.adapter for expert in mixture.experts]
    made = [
        Expert(
            names[group[0]],
            plain_adapter(mixture, [adapters[e] for e in group], part, names[group[0]]),
        )
        for group, part in zip(groups, parts, strict=True)
    ]
    made += [expert for expert in mixture.experts if expert.general]
    spec = replace(mixture.spec, trained=not mixture.spec.is_learned)
    if spec.top_k is not None:
        spec = replace(spec, top_k=min(spec.top_k, experts))
    if spec.signal == "constant":
        summed = tuple(sum(spec.weights[e] for e in group) for group in groups)
        spec = replace(spec, weights=summed)
    small = Mixture.of(spec, made, _gate(mixture, made, groups, usage))
    named = tuple(tuple(names[e] for e in group) for group in groups)
    return Consolidation(small, named, float((lost / total) ** 0.5) if total else 0.0)


def check_groups(mixture: Mixture, experts: int) -> None:
    """Refuse what a mixture's gate cannot lead, before its usage is measured.

    Raises:
        MethodError: If there are fewer experts, or the gate decides over single ranks.
    """
    count = len(mixture.names)
    if not 1 <= experts <= count:
        raise MethodError(f"{experts} of {count} experts", f"1 to {count}")
    if mixture.spec.granularity == "rank":
        raise MethodError(
            f"the {mixture.spec.preset} gate decides over single ranks: a rank that is merged from "
            "several has no row of its own in it",
            "prune it (`lora-merge train --rank-l1` on another gate), or --experts 1 for one plain "
            "adapter",
        )


def group_experts(usage: Usage, count: int) -> list[list[int]]:
    """Leaders are the most used; every other expert joins the one it is most often active with."""
    used = torch.stack([w.abs() for w in usage.mean_weights().values()]).mean(0)
    order = used.argsort(descending=True, stable=True).tolist()
    similarity = usage.similarity()
    groups = [[leader] for leader in order[:count]]
    for expert in order[count:]:
        best = max(groups, key=lambda group: float(similarity[expert, group[0]]))
        best.append(expert)
    return groups


def _shares(group: Sequence[int], weights: Tensor) -> Tensor:
    """Each member's share of its group's usage; equal where none was used."""
    part = weights[list(group)]
    whole = part.sum()
    if bool(part.abs().sum() <= 1e-12) or bool(whole.abs() <= 1e-12):
        return torch.full((len(group),), 1.0 / len(group), dtype=torch.float64)
    shares: Tensor = part / whole
    return shares


def _merged(stack: RankStack, group: Sequence[int], weights: Tensor) -> RankStack | None:
    present = [e for e in group if e in stack.adapters]
    if not present:
        return None
    scale = torch.zeros(len(weights), dtype=torch.float64)
    scale[present] = _shares(present, weights)
    mask = torch.isin(stack.owner, torch.tensor(present))
    return stack.units(mask).weighted(scale)


def _gate(
    mixture: Mixture, made: Sequence[Expert], groups: Sequence[Sequence[int]], usage: Usage
) -> dict[str, Tensor]:
    """Prototypes are computed anew; learned rows are their members' means by usage."""
    spec = mixture.spec
    if not spec.is_learned:
        alignment = align([expert.adapter for expert in made])
        return initial_gate(alignment, spec, len(groups))
    means = usage.mean_weights()
    if spec.signal == "text":
        overall = torch.stack(list(means.values())).mean(0)
        known = mixture.gate[DESCRIPTORS][None]
        led = [_mean_rows(known, group, overall)[0] for group in groups]
        return {**mixture.gate, DESCRIPTORS: torch.stack(led)}
    if spec.signal == "hidden":
        overall = torch.stack(list(means.values())).mean(0)
        gate = dict(mixture.gate)
        null = int(spec.null_expert)
        for part in ("weight", "bias"):
            name = f"classifier.{spec.depth - 1}.{part}"
            old = gate[name].view(-1, mixture.num_experts + null, *gate[name].shape[1:])
            rows = [_mean_rows(old, group, overall) for group in groups]
            rows += [old[:, -1]] * null
            gate[name] = torch.stack(rows, dim=1).flatten(0, 1).contiguous()
        return gate
    gate = {}
    for module in mixture.alignment.modules:
        rows_of = mixture.gate[f"{module.name}.weight"][None]
        order = {expert: place for place, expert in enumerate(module.specs)}
        rows = []
        for group in groups:
            present = [e for e in group if e in order]
            if present:
                local = torch.zeros(len(order), dtype=torch.float64)
                for e in present:
                    local[order[e]] = means[module.name][e]
                rows.append(_mean_rows(rows_of, [order[e] for e in present], local)[0])
        if spec.null_expert:
            rows.append(rows_of[0, -1])
        gate[f"{module.name}.weight"] = torch.stack(rows)
    return gate


def _mean_rows(rows: Tensor, group: Sequence[int], weights: Tensor) -> Tensor:
    """Mean of a group's rows, shape (N, E, ...) to (N, ...)."""
    shares = _shares(group, weights.abs()).to(rows.dtype)
    return torch.einsum("ne...,e->n...", rows[:, list(group)], shares)
