"""Spread one parameter budget over all modules.

Problem: choose ranks k_m to minimise sum_m loss_m[k_m] with sum_m cost_m k_m <= budget, where
loss_m[k] = weight_m * (energy beyond k). Water-filling by density (loss saved per parameter) is
optimal wherever it fills the budget exactly (Everett 1963); elsewhere the certificate bounds what
is missing, and the dynamic programme finds the optimum.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_merge.errors import MethodError

Floats = NDArray[np.float64]

# The dynamic programme's table has one column per cost unit. Beyond this many, costs are rounded
# up to a coarser unit: still within the budget, optimal up to that rounding.
_MAX_UNITS = 60_000


@dataclass(frozen=True, eq=False)
class Choice:
    """What one module offers: ranks that may be chosen, their costs and losses.

    Attributes:
        name: The module.
        ranks: Ranks on offer, ascending, shape (K,).
        cost: Parameters per unit of rank.
        losses: Loss at each of them, non-increasing, float64, shape (K,).
    """

    name: str
    ranks: tuple[int, ...]
    cost: int
    losses: Floats


@dataclass(frozen=True)
class Certificate:
    """How far from optimal an allocation can be.

    Attributes:
        method: "water-filling" or "dynamic programme".
        budget: Parameters allowed.
        used: Parameters used.
        loss: Objective reached.
        lower_bound: No allocation within the budget has a smaller objective.
        unit: Granularity of costs in the dynamic programme, 1 for water-filling.
    """

    method: str
    budget: int
    used: int
    loss: float
    lower_bound: float
    unit: int = 1

    @property
    def gap(self) -> float:
        """Loss minus lower bound: at most this much could be gained."""
        return max(self.loss - self.lower_bound, 0.0)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**self.__dict__, "gap": self.gap}


def water_fill(choices: Sequence[Choice], budget: int) -> tuple[dict[str, int], Certificate]:
    """Take ranks in order of loss saved per parameter while they fit.

    After the first that does not fit, smaller ones further down may still be taken (never rank
    i + 1 of a module without rank i). Ties go by module name, so order does not matter.

    Args:
        choices: One per module, with losses convex in the rank (singular values descend).
        budget: Parameters.

    Raises:
        MethodError: If the smallest ranks alone exceed the budget.
    """
    position = {c.name: 0 for c in choices}
    used = _smallest(choices, budget)
    loss = sum(float(c.losses[0]) for c in choices)
    blocked: set[str] = set()
    bound: float | None = None
    for negative_density, name, step, cost, saved in sorted(_steps(choices)):
        if name in blocked or saved <= 0:
            continue
        if used + cost > budget:
            if bound is None:
                bound = loss + negative_density * (budget - used)
            blocked.add(name)
            continue
        position[name], used, loss = step, used + cost, loss - saved
    ranks = {c.name: c.ranks[position[c.name]] for c in choices}
    loss = sum(float(c.losses[position[c.name]]) for c in choices)
    lower = loss if bound is None else max(bound, 0.0)
    return ranks, Certificate("water-filling", budget, used, loss, lower)


def optimise(choices: Sequence[Choice], budget: int) -> tuple[dict[str, int], Certificate]:
    """The optimum by dynamic programming over costs; losses need not be convex.

    Args:
        choices: One per module.
        budget: Parameters.

    Raises:
        MethodError: If the smallest ranks alone exceed the budget.
    """
    table = _Table(choices, budget)
    ranks = table.ranks_within(table.units)
    return ranks, _certificate(choices, ranks, budget, table)


def fewest_parameters(
    choices: Sequence[Choice], uniform: int
) -> tuple[dict[str, int], Certificate]:
    """L-GreCo's dual: fewest parameters whose loss is no worse than one rank for all modules.

    (Markov et al. 2024; here exact, since the dynamic programme runs over costs instead of
    discretised errors.)

    Args:
        choices: One per module.
        uniform: The rank to match; a module that offers less is matched at its largest.
    """
    index = {c.name: max(sum(r <= uniform for r in c.ranks) - 1, 0) for c in choices}
    budget = sum(c.cost * c.ranks[index[c.name]] for c in choices)
    allowed = sum(float(c.losses[index[c.name]]) for c in choices)
    table = _Table(choices, budget)
    enough = np.flatnonzero(table.best <= allowed * (1 + 1e-12))
    # Costs rounded up to a unit may put even the uniform ranks out of the table's reach.
    if enough.size == 0:
        ranks = {c.name: c.ranks[index[c.name]] for c in choices}
    else:
        ranks = table.ranks_within(int(enough[0]))
    return ranks, _certificate(choices, ranks, budget, table)


def cut_at_threshold(
    values: Mapping[str, Floats], choices: Sequence[Choice], budget: int
) -> tuple[dict[str, int], float]:
    """One threshold on s_i / s_1 for all modules, the lowest that stays within the budget.

    Args:
        values: Singular values by module, descending.
        choices: One per module.
        budget: Parameters.

    Returns:
        Ranks, and the threshold: a module keeps the values at or above it.
    """
    used = _smallest(choices, budget)
    candidates = sorted(
        (-float(values[c.name][rank - 1] / values[c.name][0]), c.name, c.cost * (rank - before), k)
        for c in choices
        if values[c.name].size and values[c.name][0] > 0
        for k, (before, rank) in enumerate(zip(c.ranks, c.ranks[1:], strict=False), start=1)
    )
    position = {c.name: 0 for c in choices}
    threshold, start = 1.0, 0
    while start < len(candidates):  # equal values stand or fall together
        stop = start
        while stop < len(candidates) and candidates[stop][0] == candidates[start][0]:
            stop += 1
        used += sum(cost for _, _, cost, _ in candidates[start:stop])
        if used > budget:
            break
        for _, name, _, k in candidates[start:stop]:
            position[name] = k
        threshold = -candidates[start][0]
        start = stop
    return {c.name: c.ranks[position[c.name]] for c in choices}, threshold


class _Table:
    """best[u] = least loss with costs of at most u units; which option each module then takes."""

    def __init__(self, choices: Sequence[Choice], budget: int) -> None:
        _smallest(choices, budget)
        self.choices = sorted(choices, key=lambda c: c.name)
        self.unit = math.gcd(*(c.cost * rank for c in choices for rank in c.ranks)) or 1
        while budget // self.unit > _MAX_UNITS:
            self.unit *= 2
        self.units = budget // self.unit
        self.best = np.zeros(self.units + 1)
        self.taken: list[NDArray[np.int32]] = []
        for choice in self.choices:
            best = np.full(self.units + 1, np.inf)
            taken = np.zeros(self.units + 1, dtype=np.int32)
            for option, rank in enumerate(choice.ranks):
                shift = self._units_of(choice, rank)
                if shift > self.units:
                    break
                candidate = self.best[: self.units + 1 - shift] + choice.losses[option]
                better = candidate < best[shift:]
                best[shift:][better] = candidate[better]
                taken[shift:][better] = option
            self.best = best
            self.taken.append(taken)
        if not np.isfinite(self.best[-1]):
            raise MethodError(
                "the budget is too tight for the coarse cost units of the exact search",
                "drop --exact",
            )

    def _units_of(self, choice: Choice, rank: int) -> int:
        return -(-choice.cost * rank // self.unit)

    def ranks_within(self, units: int) -> dict[str, int]:
        ranks = {}
        for choice, taken in zip(reversed(self.choices), reversed(self.taken), strict=True):
            rank = choice.ranks[int(taken[units])]
            ranks[choice.name] = rank
            units -= self._units_of(choice, rank)
        return ranks


def _steps(choices: Sequence[Choice]) -> list[tuple[float, str, int, int, float]]:
    """(-density, module, index, cost, loss saved) of every step to the next rank on offer."""
    steps = []
    for choice in choices:
        for k, (before, after) in enumerate(zip(choice.ranks, choice.ranks[1:], strict=False), 1):
            cost = choice.cost * (after - before)
            saved = float(choice.losses[k - 1] - choice.losses[k])
            steps.append((-saved / cost, choice.name, k, cost, saved))
    return steps


def _smallest(choices: Sequence[Choice], budget: int) -> int:
    least = sum(c.cost * c.ranks[0] for c in choices)
    if least > budget:
        raise MethodError(
            f"a budget of {budget} parameters is below the smallest ranks, which take {least}",
            "raise the budget, or allow rank 0 (--drop-empty)",
        )
    return least


def _certificate(
    choices: Sequence[Choice], ranks: Mapping[str, int], budget: int, table: _Table
) -> Certificate:
    loss = sum(float(c.losses[c.ranks.index(ranks[c.name])]) for c in choices)
    used = sum(c.cost * ranks[c.name] for c in choices)
    rounded = any(c.cost * rank % table.unit for c in choices for rank in c.ranks)
    lower = loss if not rounded else max(water_fill(choices, budget)[1].lower_bound, 0.0)
    return Certificate("dynamic programme", budget, used, loss, lower, table.unit)
