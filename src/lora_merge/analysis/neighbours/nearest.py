"""Each adapter's neighbours, near-duplicates and families, in memory that grows with N."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_merge.adapters.adapter import Adapter
from lora_merge.adapters.aligned_module import AlignedModule
from lora_merge.adapters.alignment import Alignment, read_stacks
from lora_merge.adapters.rank_stack import RankStack
from lora_merge.analysis.compare import chosen_modules
from lora_merge.analysis.families import RELATED
from lora_merge.analysis.neighbours.sketches import (
    NUMBERS,
    Candidates,
    bucket_of,
    nearest,
    part_bytes,
    sketch,
)
from lora_merge.analysis.pairs.plan import ComparisonPlan, read_bytes
from lora_merge.errors import MethodError
from lora_merge.linalg.factors import gram
from lora_merge.machine.parallel import default_jobs, in_order
from lora_merge.printing import Report, Summary, short_names

# Candidates beside the neighbours asked for: what a sketched cosine puts a few places too low.
_MORE = 8
# From this cosine on, two adapters are one for every purpose of a merge.
DUPLICATE = 0.99


@dataclass(frozen=True, eq=False, repr=False)
class Neighbours(Report):
    """The nearest adapters of each.

    Attributes:
        adapters: Their names.
        base_model: The base model they share.
        modules: How many modules were looked at.
        neighbours: For each adapter (index, cosine of the deltas), largest magnitude first.
        error: Standard error of the cosines by which candidates were chosen, measured on these;
            the cosines in `neighbours` are exact.
        missed: Largest magnitude of a chosen candidate that was the last of its adapter's: who is
            not listed has about this cosine at most, give or take some `error`.
        families: Family of each adapter: those linked by a neighbour of cosine 0.2 or more.
        duplicates: Groups linked by neighbours of cosine 0.99 or more, as indices.
    """

    adapters: tuple[str, ...]
    base_model: str | None
    modules: int
    neighbours: tuple[tuple[tuple[int, float], ...], ...]
    error: float
    missed: float
    families: tuple[int, ...]
    duplicates: tuple[tuple[int, ...], ...]

    def family_sizes(self) -> list[tuple[int, int]]:
        """(family, how many adapters), largest first."""
        sizes = torch.bincount(torch.tensor(self.families)).tolist()
        return sorted(enumerate(sizes), key=lambda one: -one[1])

    def closest(self, count: int) -> list[tuple[int, int, float]]:
        """The pairs of largest cosine, each once."""
        pairs = {
            (min(i, j), max(i, j)): cosine
            for i, near in enumerate(self.neighbours)
            for j, cosine in near
        }
        ranked = sorted(pairs.items(), key=lambda one: (-abs(one[1]), one[0]))
        return [(i, j, cosine) for (i, j), cosine in ranked[:count]]

    def summary(self) -> Summary:
        """Families, near-duplicates, and the closest pairs."""
        names = short_names(self.adapters)
        sizes = [size for _, size in self.family_sizes()]
        facts = [
            ("families", f"{len(sizes)}, the largest of {sizes[0]}"),
            ("near-duplicates", f"{sum(map(len, self.duplicates))} adapters"),
            *((f"{names[i]} ~ {names[j]}", f"{cosine:.3f}") for i, j, cosine in self.closest(4)),
        ]
        title = f"Neighbours of {len(self.adapters)} adapters on {self.modules} modules"
        return Summary(title, tuple(facts))

    def rows(self) -> list[dict[str, Any]]:
        """One row per adapter and neighbour."""
        return [
            {
                "adapter": self.adapters[i],
                "place": place,
                "neighbour": self.adapters[j],
                "cosine": cosine,
            }
            for i, near in enumerate(self.neighbours)
            for place, (j, cosine) in enumerate(near, 1)
        ]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; adapters by name."""
        return {
            "schema": 1,
            "adapters": list(self.adapters),
            "base_model": self.base_model,
            "modules": self.modules,
            "error": self.error,
            "missed": self.missed,
            "families": list(self.families),
            "duplicates": [[self.adapters[i] for i in group] for group in self.duplicates],
            "neighbours": [
                [[self.adapters[j], cosine] for j, cosine in near] for near in self.neighbours
            ],
        }


def neighbours_of(
    adapters: Sequence[Adapter],
    count: int,
    *,
    modules: Sequence[str] = (),
    accept_base_models: bool = False,
    jobs: int | None = None,
    on_module: Callable[[], None] | None = None,
) -> Neighbours:
    """Each adapter's nearest by the cosine of the deltas, over all modules.

    Sketches choose `count` and a few more candidates for each adapter; their cosines are then
    measured on the deltas. The adapters are read twice.

    Args:
        adapters: At least two, of one base model.
        count: Neighbours of each.
        modules: Shell patterns; only modules that match one. Default: all.
        accept_base_models: Accept different base model names.
        jobs: Worker threads.
        on_module: Called after each module of either pass.

    Raises:
        MethodError: If there are not so many adapters, or the patterns match no module.
        AlignmentError: If they do not fit together.
        AdapterError: If a tensor is not finite; names adapter and module.
    """
    _check_count(count, len(adapters))
    alignment = chosen_modules(adapters, modules, accept_base_models=accept_base_models)
    step = on_module or (lambda: None)
    sketches, squares = _sketched(alignment, jobs, step)
    norms = squares.clamp_min(0).sqrt()
    found = nearest(sketches, norms, min(count + _MORE, len(adapters) - 1))
    partners = _partners(found)
    products = _measured(alignment, partners, jobs, step)
    return _report(alignment, count, found, partners, products, norms)


def plan_neighbours(
    adapters: Sequence[Adapter],
    count: int,
    *,
    modules: Sequence[str] = (),
    accept_base_models: bool = False,
    jobs: int | None = None,
) -> ComparisonPlan:
    """What `neighbours_of` will take, from headers; the arguments are its own."""
    _check_count(count, len(adapters))
    alignment = chosen_modules(adapters, modules, accept_base_models=accept_base_models)
    number = len(adapters)
    largest = max(m.stack_bytes(_dtype(alignment).itemsize) for m in alignment.modules)
    return ComparisonPlan(
        adapters=number,
        modules=len(alignment.modules),
        units=max(module.num_units for module in alignment.modules),
        reads=2 * read_bytes(alignment.modules),
        # A stack, and its halves once more: units side by side, or in the dtype of products.
        working_bytes=3 * largest + 4 * number * NUMBERS // 16 + (32 << 20),
        result_bytes=2 * 4 * number * NUMBERS + part_bytes(number) + 200 * number * (count + _MORE),
        jobs=jobs or default_jobs(),
    )


def _dtype(alignment: Alignment) -> torch.dtype:
    stored = {spec.dtype for module in alignment.modules for spec in module.specs.values()}
    return torch.bfloat16 if stored == {"BF16"} else torch.float32


def _sketched(
    alignment: Alignment, jobs: int | None, step: Callable[[], None]
) -> tuple[Tensor, Tensor]:
    """Sketches of all adapters, and the squared norms of their deltas."""
    count, dtype = len(alignment.adapters), _dtype(alignment)

    def one(module: AlignedModule) -> tuple[Tensor, list[list[float]]]:
        stacks = read_stacks(alignment, module, dtype=dtype)
        pairs = [
            (sketch(stack, f"{module.name}[{expert}]", count), stack.adapter_squares())
            for expert, stack in enumerate(stacks)
        ]
        total = pairs[0][0]
        for other, _ in pairs[1:]:
            total = total + other
        return total, [squares for _, squares in pairs]

    sketches = torch.zeros(count, NUMBERS)
    total = torch.zeros(count, dtype=torch.float64)
    for index, (numbers, squares) in enumerate(in_order(one, alignment.modules, jobs=jobs)):
        sketches[:, bucket_of(index)] += numbers
        for part in squares:
            total[: len(part)] += torch.tensor(part, dtype=torch.float64)
        step()
    return sketches, total


def _partners(found: Candidates) -> list[list[int]]:
    """For each adapter the later ones whose product with it is wanted: every pair once."""
    wanted: list[set[int]] = [set() for _ in range(len(found.indices))]
    for i, near in enumerate(found.indices.tolist()):
        for j in near:
            wanted[min(i, j)].add(max(i, j))
    return [sorted(later) for later in wanted]


def _measured(
    alignment: Alignment, partners: list[list[int]], jobs: int | None, step: Callable[[], None]
) -> list[Tensor]:
    """<D_i, D_j> of each adapter with its partners, over all modules, float64."""
    dtype = _dtype(alignment)

    def one(module: AlignedModule) -> list[Tensor]:
        totals = [torch.zeros(len(later), dtype=torch.float64) for later in partners]
        for stack in read_stacks(alignment, module, dtype=dtype):
            _add_products(stack, partners, totals)
        return totals

    sums = [torch.zeros(len(later), dtype=torch.float64) for later in partners]
    for totals in in_order(one, alignment.modules, jobs=jobs):
        for total, part in zip(sums, totals, strict=True):
            total += part
        step()
    return sums


def _add_products(stack: RankStack, partners: list[list[int]], totals: list[Tensor]) -> None:
    up, down = stack.up.mT.contiguous(), stack.down
    ends = torch.bincount(stack.owner, minlength=len(partners)).cumsum(0).tolist()
    places = [slice(ends[i - 1] if i else 0, end) for i, end in enumerate(ends)]
    for i, later in enumerate(partners):
        own = places[i]
        if own.stop == own.start or not later:
            continue
        index = torch.cat([torch.arange(places[j].start, places[j].stop) for j in later])
        sizes = torch.tensor([places[j].stop - places[j].start for j in later])
        products = gram(up[own], up[index], precise=torch.float32)
        products *= gram(down[own], down[index], precise=torch.float32)
        units = (stack.scale[own] @ products) * stack.scale[index]
        whose = torch.arange(len(later)).repeat_interleave(sizes)
        totals[i].index_add_(0, whose, units)


def _report(
    alignment: Alignment,
    count: int,
    found: Candidates,
    partners: list[list[int]],
    products: list[Tensor],
    norms: Tensor,
) -> Neighbours:
    exact: dict[tuple[int, int], float] = {}
    for i, (later, values) in enumerate(zip(partners, products, strict=True)):
        for j, value in zip(later, values.tolist(), strict=True):
            size = float(norms[i] * norms[j])
            exact[i, j] = min(max(value / size, -1.0), 1.0) if size > 0 else 0.0
    near: list[list[tuple[int, float]]] = [[] for _ in norms]
    for (i, j), cosine in exact.items():
        near[i].append((j, cosine))
        near[j].append((i, cosine))
    for one in near:
        one.sort(key=lambda pair: (-abs(pair[1]), pair[0]))
    guesses = zip(found.indices.tolist(), found.cosines.tolist(), strict=True)
    errors = [
        (guess - exact[min(i, j), max(i, j)]) ** 2
        for i, (indices, cosines) in enumerate(guesses)
        for j, guess in zip(indices, cosines, strict=True)
    ]
    everyone = found.indices.shape[1] == len(norms) - 1
    twins = _linked(len(norms), exact, DUPLICATE)
    groups: dict[int, list[int]] = {}
    for index, label in enumerate(twins):
        groups.setdefault(label, []).append(index)
    return Neighbours(
        adapters=tuple(a.name for a in alignment.adapters),
        base_model=alignment.base_model,
        modules=len(alignment.modules),
        neighbours=tuple(tuple(one[:count]) for one in near),
        error=math.sqrt(sum(errors) / len(errors)),
        missed=0.0 if everyone else float(found.cosines[:, -1].abs().max()),
        families=tuple(_linked(len(norms), exact, RELATED)),
        duplicates=tuple(tuple(g) for g in groups.values() if len(g) > 1),
    )


def _linked(count: int, cosines: dict[tuple[int, int], float], least: float) -> list[int]:
    """Labels of what is linked by a cosine of at least so much, in the order of appearance."""
    parent = list(range(count))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for (i, j), cosine in cosines.items():
        if cosine >= least:
            low, high = sorted((root(i), root(j)))
            parent[high] = low
    first: dict[int, int] = {}
    return [first.setdefault(root(i), len(first)) for i in range(count)]


def _check_count(count: int, adapters: int) -> None:
    """Refuse more neighbours than there are.

    Raises:
        MethodError: Saying how many there are.
    """
    if 1 < adapters <= count:
        raise MethodError(f"{count} neighbours of {adapters} adapters", f"give 1 to {adapters - 1}")
