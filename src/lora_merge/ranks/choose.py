"""Spectra → ranks: one function for every rule, shared by `resize` and by merge's compression."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_merge.errors import MethodError
from lora_merge.printing import Report, Summary, span
from lora_merge.ranks.budget import (
    Certificate,
    Choice,
    cut_at_threshold,
    fewest_parameters,
    optimise,
    water_fill,
)
from lora_merge.ranks.measures import tail_energy
from lora_merge.ranks.module_rules import RULES
from lora_merge.ranks.rule import RankRule, parse_rule


@dataclass(frozen=True)
class ModuleRank:
    """One module's part of a plan.

    Attributes:
        before: Rank it has.
        rank: Rank it gets.
        energy: Share of its energy that is kept, 1 for a zero module.
        cost: Parameters per unit of rank.
        frobenius: Norm before.
    """

    before: int
    rank: int
    energy: float
    cost: int
    frobenius: float


@dataclass(frozen=True, repr=False)
class RankPlan(Report):
    """Ranks for all modules and what they keep.

    Attributes:
        rule: The rule they came from.
        modules: By name, in the order given.
        certificate: Distance to the optimum where a budget was spread.
        threshold: The global cut that was found (welore with a budget).
    """

    rule: RankRule
    modules: Mapping[str, ModuleRank]
    certificate: Certificate | None = None
    threshold: float | None = None

    @property
    def ranks(self) -> dict[str, int]:
        """Module → rank."""
        return {name: module.rank for name, module in self.modules.items()}

    @property
    def parameters(self) -> int:
        """Entries of all factors after."""
        return sum(m.rank * m.cost for m in self.modules.values())

    @property
    def parameters_before(self) -> int:
        """Entries of all factors before."""
        return sum(m.before * m.cost for m in self.modules.values())

    @property
    def energy(self) -> float:
        """Share of all modules' energy together that is kept; 1 where all are zero."""
        total = math.fsum(m.frobenius**2 for m in self.modules.values())
        kept = math.fsum(m.energy * m.frobenius**2 for m in self.modules.values())
        return min(kept / total, 1.0) if total > 0 else 1.0

    def summary(self) -> Summary:
        """Rule, ranks, parameters and energy."""
        ranks = list(self.ranks.values()) or [0]
        before = [m.before for m in self.modules.values()] or [0]
        return Summary(
            "Rank plan",
            (
                ("rule", str(self.rule)),
                ("ranks", f"{span(ranks)} (were {span(before)}), {len(self.modules)} modules"),
                ("parameters", f"{self.parameters:,} (were {self.parameters_before:,})"),
                ("energy kept", f"{100 * self.energy:.2f} %"),
            ),
        )

    def rows(self) -> list[dict[str, Any]]:
        """One row per module."""
        return [{"module": name, **module.__dict__} for name, module in self.modules.items()]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "rule": str(self.rule),
            "parameters": self.parameters,
            "parameters_before": self.parameters_before,
            "energy": self.energy,
            "threshold": self.threshold,
            "certificate": self.certificate.to_dict() if self.certificate else None,
            "modules": {name: dict(module.__dict__) for name, module in self.modules.items()},
        }


def choose_ranks(
    spectra: Mapping[str, Tensor],
    costs: Mapping[str, int],
    rule: RankRule | str,
    *,
    before: Mapping[str, int] | None = None,
    min_rank: int = 1,
    max_rank: int | None = None,
    round_to: int = 1,
    weights: Mapping[str, float] | None = None,
    exact: bool = False,
    rtol: float = 1e-12,
) -> RankPlan:
    """Choose a rank for every module.

    Args:
        spectra: Module → singular values (scaling included), descending, float64, 1-D.
        costs: Module → parameters per unit of rank: (d_in + d_out) times its experts.
        rule: The rule, or its text.
        before: Module → rank it has now; default: the number of values.
        min_rank: Smallest rank; 0 lets zero modules and worthless ones be dropped.
        max_rank: Largest rank.
        round_to: Ranks become multiples of this, rounded up, where a module has that many.
        weights: Module → weight of its squared error in `budget` and `match`; default 1.
        exact: Spread a budget by dynamic programming instead of water-filling.
        rtol: Values at or below `rtol` times a module's largest count as zero.

    Raises:
        MethodError: If a value is not finite, or the rule cannot be met.
    """
    rule = parse_rule(rule) if isinstance(rule, str) else rule
    before = before or {name: values.numel() for name, values in spectra.items()}
    clean = {name: _clean(name, values, rtol) for name, values in spectra.items()}
    limits = {name: _limits(before[name], min_rank, max_rank) for name in spectra}
    certificate: Certificate | None = None
    threshold: float | None = None
    if rule.is_global:
        ranks, certificate, threshold = _allocate(
            rule, clean, costs, before, limits, round_to, weights or {}, exact
        )
    else:
        ranks, of_module = {}, RULES[rule.kind]
        for name, values in clean.items():
            rank = of_module(values, rule.value or 0.0) if values.numel() else 0
            low, high = limits[name]
            ranks[name] = min(max(-(-rank // round_to) * round_to, low), high)
    modules = {
        name: _module_rank(spectra[name], before[name], ranks[name], costs[name])
        for name in spectra
    }
    return RankPlan(rule, modules, certificate, threshold)


def _allocate(
    rule: RankRule,
    spectra: Mapping[str, Tensor],
    costs: Mapping[str, int],
    before: Mapping[str, int],
    limits: Mapping[str, tuple[int, int]],
    round_to: int,
    weights: Mapping[str, float],
    exact: bool,
) -> tuple[dict[str, int], Certificate | None, float | None]:
    value = rule.value or 0.0
    choices = [
        _choice(name, values, costs[name], limits[name], round_to, weights.get(name, 1.0))
        for name, values in spectra.items()
    ]
    if rule.kind == "match":
        ranks, certificate = fewest_parameters(choices, int(value))
        return ranks, certificate, None
    if rule.unit == "share":
        value *= sum(costs[name] * before[name] for name in spectra)
    budget = int(value)
    if rule.kind == "welore":
        arrays = {name: values.numpy() for name, values in spectra.items()}
        ranks, threshold = cut_at_threshold(arrays, choices, budget)
        return ranks, None, threshold
    ranks, certificate = (optimise if exact else water_fill)(choices, budget)
    return ranks, certificate, None


def _choice(
    name: str, values: Tensor, cost: int, limits: tuple[int, int], step: int, weight: float
) -> Choice:
    """Ranks on offer: the smallest, the multiples of `step` above it, and the largest useful."""
    low, high = limits
    useful = max(low, min(high, -(-values.numel() // step) * step))
    ranks = sorted({low, useful, *range(-(-low // step) * step, useful + 1, step)})
    losses = weight * tail_energy(values)
    index = torch.tensor(ranks).clamp_max(values.numel())
    return Choice(name, tuple(ranks), cost, losses[index].numpy())


def _module_rank(values: Tensor, before: int, rank: int, cost: int) -> ModuleRank:
    tail = tail_energy(values)
    total = float(tail[0])
    kept = 1.0 - float(tail[min(rank, values.numel())]) / total if total > 0 else 1.0
    return ModuleRank(before, rank, kept, cost, math.sqrt(total))


def _clean(name: str, values: Tensor, rtol: float) -> Tensor:
    """The values that are not numerically zero."""
    if not bool(torch.isfinite(values).all()):
        raise MethodError(f"{name}: its singular values are not finite", "leave this module out")
    values = values.detach().to("cpu", torch.float64)
    return values[values > rtol * values[:1]] if values.numel() else values


def _limits(before: int, min_rank: int, max_rank: int | None) -> tuple[int, int]:
    high = before if max_rank is None else min(before, max_rank)
    return min(min_rank, high), high
