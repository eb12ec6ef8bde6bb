"""What a person wants to know of an adapter's spectra: groups, a map, and what rank to keep."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import median, median_high
from typing import Any

from lora_merge.adapters.measured.spectra import AdapterSpectra, ModuleSpectrum
from lora_merge.adapters.module_names import labels
from lora_merge.analysis.metrics import METRICS
from lora_merge.printing import span
from lora_merge.ranks.choose import RankPlan, choose_ranks
from lora_merge.ranks.measures import tail_energy

_RANGES = (3, 2, 1)
_MOST_ROWS = 12


@dataclass(frozen=True)
class Group:
    """Modules of one kind and a range of layers; numbers are medians over them.

    Attributes:
        label: Kind, shortened.
        layers: First and last layer, None where modules have no layer number.
        modules: The spectra.
        rank: Smallest and largest stored rank.
        frobenius: Median Frobenius norm.
        spectral: Median largest singular value.
        stable_rank: Median stable rank.
        effective_rank: Median effective rank (Roy-Vetterli).
        ranks_at: Energy level → median rank that holds it.
    """

    label: str
    layers: tuple[int, int] | None
    modules: tuple[ModuleSpectrum, ...]
    rank: tuple[int, int]
    frobenius: float
    spectral: float
    stable_rank: float
    effective_rank: float
    ranks_at: dict[float, int]


@dataclass(frozen=True)
class Option:
    """One way to shrink the adapter.

    Attributes:
        text: What is kept, in words.
        flag: The option of `resize` that does it.
        energy: Share of the energy kept.
        parameters: Share of the parameters kept.
        ranks: Smallest and largest rank.
    """

    text: str
    flag: str
    energy: float
    parameters: float
    ranks: tuple[int, int]


@dataclass(frozen=True)
class Advice:
    """What to make of an adapter's spectra.

    Attributes:
        headline: One sentence.
        options: Ways to shrink it, with what each keeps.
        remarks: What is odd about the spectra.
    """

    headline: str
    options: tuple[Option, ...]
    remarks: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def group_modules(spectra: AdapterSpectra) -> list[Group]:
    """Modules by kind and layer range; as many ranges as fit one screen."""
    names = labels(m.place for m in spectra.modules)
    kinds: dict[tuple[str, str], list[ModuleSpectrum]] = {}
    for module in spectra.modules:
        kinds.setdefault((module.place.stack, module.place.kind), []).append(module)
    layers = {m.place.layer for m in spectra.modules} - {None}
    ranges = next(n for n in _RANGES if n == 1 or n * len(kinds) <= _MOST_ROWS)
    ranges = min(ranges, max(1, len(layers) // 2))
    groups = []
    for key, members in kinds.items():
        members.sort(key=lambda m: m.place.layer or 0)
        distinct = sorted({m.place.layer or 0 for m in members})
        for part in _split(distinct, ranges):
            chosen = tuple(m for m in members if (m.place.layer or 0) in part)
            numbered = chosen[0].place.layer is not None
            groups.append(_group(names[key], (part[0], part[-1]) if numbered else None, chosen))
    return groups


def total_group(spectra: AdapterSpectra) -> Group:
    """All modules together."""
    return _group("all modules", None, spectra.modules)


def single_groups(modules: Sequence[ModuleSpectrum]) -> list[Group]:
    """Every module by itself, under its full name."""
    return [_group(m.name, None, (m,)) for m in modules]


def sort_modules(modules: Sequence[ModuleSpectrum], key: str) -> list[ModuleSpectrum]:
    """By a metric, largest first (modules that cannot be measured last), or by "name"."""
    if key == "name":
        return list(modules)
    metric = METRICS[key]
    return sorted(modules, key=lambda m: -metric(m.measures) if m.measures else math.inf)


def advise(spectra: AdapterSpectra) -> Advice:
    """Ways to shrink an adapter, and what is odd about it."""
    values = {n: v for n, v in spectra.by_module.items() if float(v.sum()) > 0}
    remarks = tuple(_remarks(spectra))
    if not values:
        why = "every delta is zero" if spectra.finite else "no module is finite"
        return Advice(f"{why}: there is nothing to keep", (), remarks)
    ranks, per_unit = spectra.ranks, spectra.costs
    before = {n: ranks[n] for n in values}
    costs = {n: per_unit[n] for n in values}

    def plan(rule: str) -> RankPlan:
        return choose_ranks(values, costs, rule, before=before)

    full = max(before.values())
    uniform = _uniform_rank(list(values.values()), 0.95)
    candidates = [
        ("99 % of every module", "--energy 0.99", plan("energy:0.99")),
        ("95 % of every module", "--energy 0.95", plan("energy:0.95")),
        ("90 % of every module", "--energy 0.9", plan("energy:0.9")),
        ("95 % in all, one rank", f"--rank {uniform}", plan(str(uniform))),
    ]
    if sum(costs.values()) <= sum(costs[n] * r for n, r in before.items()) // 2:
        candidates.append(("half of the parameters", "--budget x0.5", plan("budget:x0.5")))
        candidates.append(("up to each spectrum's knee", "--elbow", plan("elbow")))
    options = tuple(_option(text, flag, p) for text, flag, p in candidates)
    at95 = options[1]
    if full == 1:
        headline = "rank 1: there is nothing to choose"
    else:
        headline = (
            f"95 % of the energy needs rank {span(at95.ranks)} of {full}: "
            f"{100 * at95.parameters:.0f} % of the parameters"
        )
    return Advice(headline, options if full > 1 else (), remarks)


def _option(text: str, flag: str, plan: RankPlan) -> Option:
    ranks = plan.ranks.values()
    return Option(
        text,
        flag,
        plan.energy,
        plan.parameters / plan.parameters_before,
        (min(ranks), max(ranks)),
    )


def _uniform_rank(values: Sequence[Any], share: float) -> int:
    """Smallest rank that, given to every module, keeps a share of all energy together."""
    tails = [tail_energy(v).tolist() for v in values]
    total = math.fsum(t[0] for t in tails)
    for rank in range(1, max(len(t) for t in tails)):
        if math.fsum(t[min(rank, len(t) - 1)] for t in tails) <= (1 - share) * total:
            return rank
    return max(len(t) for t in tails) - 1


def _remarks(spectra: AdapterSpectra) -> list[str]:
    found = []
    for status, why in (
        ("not finite", "NaN or infinite entries, left out of every number"),
        ("untrained", "B is zero, as before training"),
        ("zero", "the delta is zero"),
    ):
        hit = [m for m in spectra.modules if m.status == status]
        if hit:
            detail = f" ({hit[0].detail})" if hit[0].detail else ""
            found.append(f"{_count(hit)} {why}{_example(hit)}{detail}")
    alive = [m for m in spectra.finite if m.status == "ok" and m.measures and m.spec.rank > 1]
    spiked = [m for m in alive if m.measures and m.measures.top1_share > 0.9]
    if spiked:
        found.append(
            f"{_count(spiked)} nearly rank one (first direction above 90 % of the energy)"
            f"{_example(spiked)}"
        )
    flat = [m for m in alive if m.measures and m.measures.noise_tail == m.spec.rank > 3]
    if flat:
        found.append(
            f"{_count(flat)} as flat as random factors would be: no rank stands out{_example(flat)}"
        )
    short = [m for m in alive if m.measures and m.measures.numerical_rank < m.spec.rank]
    if short:
        found.append(
            f"{_count(short)} of numerical rank below r, so the rest of the rank is free to drop"
            f"{_example(short)}"
        )
    return found


def _count(modules: Sequence[ModuleSpectrum]) -> str:
    return "1 module:" if len(modules) == 1 else f"{len(modules)} modules:"


def _example(modules: Sequence[ModuleSpectrum]) -> str:
    """The module it is said of, or the first of several."""
    return f": {modules[0].name}" if len(modules) == 1 else f", such as {modules[0].name}"


def _group(
    label: str, layers: tuple[int, int] | None, modules: tuple[ModuleSpectrum, ...]
) -> Group:
    ranks = [m.spec.rank for m in modules]
    measures = [m.measures for m in modules if m.measures]
    levels = Counter(level for m in measures for level in m.ranks_at)
    return Group(
        label=label,
        layers=layers,
        modules=modules,
        rank=(min(ranks), max(ranks)),
        frobenius=_median([m.frobenius for m in measures]),
        spectral=_median([m.spectral for m in measures]),
        stable_rank=_median([m.stable_rank for m in measures]),
        effective_rank=_median([m.effective_rank for m in measures]),
        ranks_at={level: median_high([m.ranks_at[level] for m in measures]) for level in levels},
    )


def _median(values: Sequence[float]) -> float:
    return median(values) if values else 0.0


def _split(values: Sequence[int], parts: int) -> list[list[int]]:
    """A list in `parts` runs of nearly equal length, none empty."""
    parts = min(parts, len(values))
    bounds = [round(i * len(values) / parts) for i in range(parts + 1)]
    return [list(values[a:b]) for a, b in pairwise(bounds)]
