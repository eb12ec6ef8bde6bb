"""Compare adapters pair by pair: how alike, how orthogonal, how much in each other's way."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lora_merge.adapters.adapter import Adapter
from lora_merge.adapters.alignment import Alignment, align, read_stacks
from lora_merge.adapters.module_names import labels, place_of
from lora_merge.adapters.patterns import select_names
from lora_merge.analysis.overlap import PairTables, pair_tables
from lora_merge.errors import AdapterError, MethodError
from lora_merge.machine.parallel import in_order
from lora_merge.printing import Report, Summary

# Total samples for sign conflicts: a standard error below 0.2 % for every pair.
_SAMPLES = 65_536
_TABLES = [f.name for f in fields(PairTables) if not f.name.startswith(("total", "angles"))]


@dataclass(frozen=True, eq=False)
class PairMatrices:
    """All pairs, over some modules; every matrix has shape (N, N), float64, and no NaN.

    Attributes:
        label: Which modules.
        modules: How many they are.
        norms: Frobenius norm of each adapter, shape (N,).
        shared: Modules that both have.
        cosine: <D_i, D_j> / (|D_i| |D_j|).
        overlap_out: Mean squared cosine of principal angles between output spaces.
        overlap_in: The same of input spaces.
        chance_out: What random subspaces would show.
        chance_in: The same for inputs.
        dimensions: Principal angles per module, on average.
        cosine_out: Largest principal cosine of output spaces, averaged.
        cosine_in: The same of input spaces.
        interference: Singular task interference over the sum of nuclear norms.
        chance_interference: What random subspaces with the same spectra would show.
        conflict: Share of entries whose signs differ.
        conflict_error: Standard error of that.
        conflict_mass: Share of min(|D_i|, |D_j|) that is in conflict.
        factor_a: Cosine of the raw A (0 for different ranks): shared initialisation shows here.
        factor_b: Cosine of the raw B.
        unit_match: Mean best match of the units of i among those of j; for i = j, in itself.
        cancellation: |D_i + D_j| / (|D_i| + |D_j|): 1 if they add up, 0 if they cancel.
        set_cancellation: The same of all adapters together.
        set_interference: Interference of all, over (N - 1)^2 and the sum of nuclear norms.
        angles_out: All principal cosines of the output spaces of one module, descending, shape
            (N, N, K), zero beyond `dimensions`; None where not asked for.
        angles_in: The same of the input spaces.
    """

    label: str
    modules: int
    norms: Tensor
    shared: Tensor
    cosine: Tensor
    overlap_out: Tensor
    overlap_in: Tensor
    chance_out: Tensor
    chance_in: Tensor
    dimensions: Tensor
    cosine_out: Tensor
    cosine_in: Tensor
    interference: Tensor
    chance_interference: Tensor
    conflict: Tensor
    conflict_error: Tensor
    conflict_mass: Tensor
    factor_a: Tensor
    factor_b: Tensor
    unit_match: Tensor
    cancellation: Tensor
    set_cancellation: float
    set_interference: float
    angles_out: Tensor | None = None
    angles_in: Tensor | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; principal cosines only where they were asked for."""
        document = {
            name: value.tolist() if isinstance(value, Tensor) else value
            for name, value in self.__dict__.items()
            if value is not None
        }
        sizes = self.dimensions.long().tolist()
        for name in {"angles_out", "angles_in"} & document.keys():
            document[name] = [
                [cosines[:size] for cosines, size in zip(*rows, strict=True)]
                for rows in zip(document[name], sizes, strict=True)
            ]
        return document


@dataclass(frozen=True, eq=False, repr=False)
class Comparison(Report):
    """The comparison of N adapters.

    Attributes:
        adapters: Their names.
        base_model: The base model they share.
        tables: Module (or expert) name → its pair tables.
    """

    adapters: tuple[str, ...]
    base_model: str | None
    tables: dict[str, PairTables]

    @cached_property
    def total(self) -> PairMatrices:
        """Over all modules."""
        return _matrices("all modules", list(self.tables.values()))

    @cached_property
    def kinds(self) -> tuple[PairMatrices, ...]:
        """By kind of module."""
        places = {name: place_of(name.partition("[")[0]) for name in self.tables}
        names = labels(places.values())
        grouped: dict[str, list[PairTables]] = {}
        for name, tables in self.tables.items():
            place = places[name]
            grouped.setdefault(names[place.stack, place.kind], []).append(tables)
        return tuple(_matrices(label, tables) for label, tables in grouped.items())

    @cached_property
    def modules(self) -> tuple[PairMatrices, ...]:
        """Module by module."""
        return tuple(_matrices(name, [tables]) for name, tables in self.tables.items())

    @cached_property
    def by_whole_module(self) -> dict[str, PairMatrices]:
        """Module → its matrices, all its experts together."""
        grouped: dict[str, list[PairTables]] = {}
        for name, tables in self.tables.items():
            grouped.setdefault(name.partition("[")[0], []).append(tables)
        return {name: _matrices(name, tables) for name, tables in grouped.items()}

    @property
    def has_angles(self) -> bool:
        """Whether all principal cosines of every module were kept."""
        return all(tables.angles_out is not None for tables in self.tables.values())

    def merged_norm(self, weights: Sequence[float]) -> float:
        """Frobenius norm of sum_i w_i D_i, from the inner products."""
        products = torch.stack([t.products for t in self.tables.values()]).sum(0)
        w = torch.tensor(weights, dtype=torch.float64)
        return math.sqrt(max(float(w @ products @ w), 0.0))

    def summary(self) -> Summary:
        """The pairs with the largest cosines, up to six."""
        short = [name.rstrip("/").rpartition("/")[2] for name in self.adapters]
        names = short if len(set(short)) == len(short) else list(self.adapters)
        shown = dict(zip(self.adapters, names, strict=True))
        pairs = sorted(self.rows(), key=lambda row: -abs(row["cosine"]))
        facts = [
            (
                f"{shown[row['first']]} ~ {shown[row['second']]}",
                f"cosine {row['cosine']:.3f}, interference {row['interference']:.3f} "
                f"(chance {row['chance_interference']:.3f}), signs differ {row['conflict']:.0%}",
            )
            for row in pairs[:6]
        ]
        if len(pairs) > 6:
            facts.append(("and", f"{len(pairs) - 6} pairs more"))
        title = f"Comparison of {len(self.adapters)} adapters on {self.total.modules} modules"
        return Summary(title, tuple(facts))

    def rows(self) -> list[dict[str, Any]]:
        """One row per pair, over all modules."""
        count = len(self.adapters)
        matrices = {
            name: value
            for name, value in vars(self.total).items()
            if isinstance(value, Tensor) and value.shape == (count, count)
        }
        return [
            {
                "first": self.adapters[i],
                "second": self.adapters[j],
                **{name: float(value[i, j]) for name, value in matrices.items()},
            }
            for i in range(count)
            for j in range(i + 1, count)
        ]

    def to_dict(self, *, per_module: bool = False) -> dict[str, Any]:
        """JSON-ready; matrices of single modules only where asked for."""
        document: dict[str, Any] = {
            "schema": 1,
            "adapters": list(self.adapters),
            "base_model": self.base_model,
            "total": self.total.to_dict(),
            "kinds": [kind.to_dict() for kind in self.kinds],
        }
        if per_module:
            document["modules"] = [module.to_dict() for module in self.modules]
        return document


def compare(
    adapters: Sequence[Adapter],
    *,
    modules: Sequence[str] = (),
    angles: bool = False,
    accept_base_models: bool = False,
    seed: int = 0,
    jobs: int | None = None,
    on_module: Callable[[], None] | None = None,
) -> Comparison:
    """Compare all pairs of adapters, module by module, without dense deltas.

    Args:
        adapters: At least two, of one base model.
        modules: Shell patterns; only modules that match one. Default: all.
        angles: Keep every module's principal cosines, not only the largest.
        accept_base_models: Accept different base model names.
        seed: Of the sampled sign conflicts.
        jobs: Worker threads.
        on_module: Called after each module.

    Raises:
        MethodError: If there are fewer than two adapters, or the patterns match no module.
        AlignmentError: If they do not fit together.
        AdapterError: If a tensor is not finite; names adapter and module.
    """
    if len(adapters) < 2:
        raise MethodError("a comparison needs at least two adapters", "name another one")
    alignment = align(adapters, accept_base_models=accept_base_models)
    if modules:
        chosen = set(select_names([m.name for m in alignment.modules], modules, "the adapters"))
        kept = tuple(m for m in alignment.modules if m.name in chosen)
        alignment = replace(alignment, modules=kept)
    samples = min(max(_SAMPLES // len(alignment.modules), 256), 8192)

    specs = [spec for module in alignment.modules for spec in module.specs.values()]
    sixteen_bit = all(spec.dtype == "BF16" and spec.recipe.is_stored for spec in specs)
    dtype = torch.bfloat16 if sixteen_bit else torch.float32  # half the memory traffic

    def one(index: int) -> list[tuple[str, PairTables]]:
        return _compare_module(alignment, index, dtype, samples, seed, angles)

    tables: dict[str, PairTables] = {}
    with _bfloat16_products(sixteen_bit):
        for results in in_order(one, range(len(alignment.modules)), jobs=jobs):
            tables.update(results)
            if on_module:
                on_module()
    return Comparison(tuple(a.name for a in adapters), alignment.base_model, tables)


@contextlib.contextmanager
def _bfloat16_products(allowed: bool) -> Iterator[None]:
    """Let float32 products run on bfloat16 hardware: exact for factors stored in bfloat16.

    Inputs are then representable and sums stay in float32; with AMX it is four times as fast.
    """
    before = torch.get_float32_matmul_precision()
    if allowed:
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _compare_module(
    alignment: Alignment, index: int, dtype: torch.dtype, samples: int, seed: int, angles: bool
) -> list[tuple[str, PairTables]]:
    module = alignment.modules[index]
    several = module.first.num_experts > 1
    count = len(alignment.adapters)
    results = []
    for expert, stack in enumerate(read_stacks(alignment, module, dtype=dtype)):
        name = f"{module.name}[{expert}]" if several else module.name
        try:
            tables = pair_tables(stack, count, samples=samples, seed=seed + index, angles=angles)
        except FloatingPointError as error:
            raise AdapterError(
                f"{name}: the factors are too large to multiply", "leave this module out"
            ) from error
        results.append((name, tables))
    return results


def _matrices(label: str, tables: Sequence[PairTables]) -> PairMatrices:
    total = {name: torch.stack([getattr(t, name) for t in tables]).sum(0) for name in _TABLES}
    count = total["products"].shape[0]
    products = total["products"]
    norms = products.diagonal().clamp_min(0).sqrt()
    present, samples = total["present"], total["samples"]
    conflict = _divide(total["conflicts"], samples)
    added = (products.diagonal()[:, None] + products.diagonal() + 2 * products).clamp_min(0).sqrt()
    nuclear = sum(t.total_nuclear for t in tables) * (count - 1) ** 2
    both = norms[:, None] * norms
    return PairMatrices(
        label=label,
        modules=len(tables),
        norms=norms,
        shared=present,
        cosine=_divide(products, both).clamp(-1, 1),
        overlap_out=_divide(total["overlap_out"], present),
        overlap_in=_divide(total["overlap_in"], present),
        chance_out=_divide(total["chance_out"], present),
        chance_in=_divide(total["chance_in"], present),
        dimensions=_divide(total["dimensions"], present),
        cosine_out=_divide(total["cosine_out"], present),
        cosine_in=_divide(total["cosine_in"], present),
        interference=_divide(total["interference"], total["nuclear"]),
        chance_interference=_divide(total["chance_interference"], total["nuclear"]),
        conflict=conflict,
        conflict_error=_divide(conflict * (1 - conflict), samples).sqrt(),
        conflict_mass=_divide(total["conflict_mass"], total["mass"]),
        factor_a=_correlation(total["factor_a"]),
        factor_b=_correlation(total["factor_b"]),
        unit_match=_divide(total["unit_match"], present),
        cancellation=_divide(added, norms[:, None] + norms),
        set_cancellation=_ratio(math.sqrt(max(float(products.sum()), 0.0)), float(norms.sum())),
        set_interference=_ratio(sum(t.total_interference for t in tables), nuclear),
        angles_out=tables[0].angles_out if len(tables) == 1 else None,
        angles_in=tables[0].angles_in if len(tables) == 1 else None,
    )


def _divide(part: Tensor, whole: Tensor) -> Tensor:
    """`part / whole`, 0 where there is nothing."""
    return torch.where(whole > 0, part / whole.clamp_min(1e-300), 0.0)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def _correlation(products: Tensor) -> Tensor:
    norms = products.diagonal().clamp_min(0).sqrt()
    return _divide(products, norms[:, None] * norms).clamp(-1, 1)
