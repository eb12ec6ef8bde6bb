"""Spectra → ranks: one function for every rule, shared by `resize` and by merge's compression."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_merge.analysis import rules
from lora_merge.analysis.budget import (
    Certificate,
    Choice,
    cut_at_threshold,
    fewest_parameters,
    optimise,
    water_fill,
)
from lora_merge.analysis.measures import tail_energy
from lora_merge.errors import MethodError


@dataclass(frozen=True)
class _Kind:
    """One rule: how it is called, what its value may be, and what it says of itself."""

    apply: rules.ModuleRule | None
    default: float | None
    low: float
    high: float
    about: str


_KINDS: dict[str, _Kind] = {
    "fixed": _Kind(rules.fixed, None, 0, math.inf, "the same rank for every module"),
    "energy": _Kind(rules.energy, 0.95, 0, 1, "share of sum s^2 that a module keeps"),
    "nuclear": _Kind(rules.nuclear, 0.95, 0, 1, "share of sum s that a module keeps"),
    "ratio": _Kind(rules.ratio, 20, 1, math.inf, "keeps values above the first / this"),
    "elbow": _Kind(rules.elbow, 0, 0, 0, "cut at the knee of each spectrum"),
    "erank": _Kind(rules.effective, 0, 0, 0, "the effective rank (Roy-Vetterli), rounded up"),
    "soka": _Kind(rules.soka, 0.95, 0, 1, "the smaller of energy and elbow"),
    "full": _Kind(rules.full, 0, 0, 0, "every direction that is not numerically zero"),
    "welore": _Kind(rules.threshold, 0.05, 0, 1, "one cut on s / s_1, or the one for a budget"),
    "budget": _Kind(None, None, 0, math.inf, "a parameter budget, spread where it saves most"),
    "match": _Kind(None, None, 1, math.inf, "fewest parameters, error as at this uniform rank"),
    "kohya-fro": _Kind(rules.kohya_fro, 0.9, 0, 1, "sd-scripts' sv_fro"),
    "kohya-cumulative": _Kind(rules.kohya_cumulative, 0.9, 0, 1, "sd-scripts' sv_cumulative"),
    "kohya-ratio": _Kind(rules.kohya_ratio, 20, 1, math.inf, "sd-scripts' sv_ratio"),
    "lycoris-quantile": _Kind(rules.lycoris_quantile, 0.9, 0, 1, "LyCORIS' quantile"),
    "lycoris-ratio": _Kind(rules.lycoris_ratio, 0.05, 0, 1, "LyCORIS' ratio"),
    "lycoris-threshold": _Kind(rules.lycoris_threshold, 0.0, 0, math.inf, "LyCORIS' threshold"),
    "peft": _Kind(rules.energy, 0.95, 0, 1, "PEFT's float rank (equal to energy)"),
}
_BUDGETED = ("budget", "welore")
_WHOLE = ("fixed", "match")
_TEXT = re.compile(r"^(?P<kind>[a-z-]+)(?::(?P<value>.+))?$")


@dataclass(frozen=True)
class RankRule:
    """How ranks are chosen.

    Attributes:
        kind: Name of the rule; `rule_names()` lists them.
        value: Its number, None where the rule takes none.
        unit: What a budget is counted in: "parameters", or "share" of what there is now.
    """

    kind: str
    value: float | None = None
    unit: str = ""

    def __str__(self) -> str:
        if self.kind == "fixed":
            return f"{self.value:g}"
        if self.value is None or (self.kind in _KINDS and _KINDS[self.kind].high == 0):
            return self.kind
        prefix = "x" if self.unit == "share" else ""
        digits = ".0f" if self.unit == "parameters" else "g"
        return f"{self.kind}:{prefix}{self.value:{digits}}"


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


@dataclass(frozen=True)
class RankPlan:
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


def rule_names() -> dict[str, str]:
    """Every rule and what it does."""
    return {name: kind.about for name, kind in _KINDS.items()}


def parse_rule(text: str) -> RankRule:
    """Read a rule: `16`, `energy:0.95`, `elbow`, `budget:x0.5`, `budget:120000`, `full`, ...

    Raises:
        MethodError: If it names no rule, or its number is out of range.
    """
    if re.fullmatch(r"\d+", text):
        text = f"fixed:{text}"
    match = _TEXT.match(text)
    if match is None or match["kind"] not in _KINDS:
        raise MethodError(
            f"{text!r} is no rank rule",
            f"give a rank, or one of {', '.join(_KINDS)}, as in energy:0.95 or budget:x0.5",
        )
    kind, raw = match["kind"], match["value"]
    spec = _KINDS[kind]
    if raw is None:
        if spec.default is None:
            raise MethodError(f"the rank rule {kind!r} needs a number", f"write {kind}:NUMBER")
        return RankRule(kind, spec.default if spec.high else None)
    unit = ""
    if kind in _BUDGETED:
        unit = "share" if raw.startswith("x") else "parameters"
        if kind == "welore" and unit == "parameters" and _number(raw, text) <= 1:
            unit = ""
    value = _number(raw.removeprefix("x") if unit == "share" else raw, text)
    _check_range(kind, value, unit, text)
    return RankRule(kind, value, unit)


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
    if rule.kind in ("budget", "match") or (rule.kind == "welore" and rule.unit):
        ranks, certificate, threshold = _allocate(
            rule, clean, costs, before, limits, round_to, weights or {}, exact
        )
    else:
        apply, value = _KINDS[rule.kind].apply, rule.value or 0.0
        assert apply is not None
        ranks = {}
        for name, values in clean.items():
            rank = apply(values, value) if values.numel() else 0
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


def _number(text: str, rule: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise MethodError(f"{rule!r}: {text!r} is no number", "write it like energy:0.95")
    return value


def _check_range(kind: str, value: float, unit: str, text: str) -> None:
    spec = _KINDS[kind]
    low, high = spec.low, spec.high
    if unit:
        low, high = (0, 1) if unit == "share" else (0, math.inf)
    whole = kind in _WHOLE or unit == "parameters"
    if not low <= value <= high or (whole and value != int(value)) or high == 0:
        limits = "takes no number" if high == 0 else f"lies between {low:g} and {high:g}"
        raise MethodError(
            f"{text!r}: the number of {kind!r} {limits}{' and is whole' if whole else ''}",
            f"{kind}: {spec.about}",
        )
