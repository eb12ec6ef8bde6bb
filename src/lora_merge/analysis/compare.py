"""Compare adapters pair by pair: how alike, how orthogonal, how much in each other's way."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lora_merge.adapters.adapter import Adapter
from lora_merge.adapters.alignment import Alignment, align, read_stacks
from lora_merge.adapters.module_names import labels, place_of
from lora_merge.adapters.patterns import select_names
from lora_merge.analysis.pairs.matrices import PairMatrices, matrices_of
from lora_merge.analysis.pairs.overlap import PairSums, PairTables, pair_tables
from lora_merge.analysis.pairs.telling import Telling
from lora_merge.errors import AdapterError, MethodError
from lora_merge.machine.parallel import in_order
from lora_merge.printing import Report, Summary

# Total samples for sign conflicts: a standard error below 0.2 % for every pair.
_SAMPLES = 65_536


@dataclass(frozen=True, eq=False, repr=False)
class Comparison(Report):
    """The comparison of N adapters.

    Attributes:
        adapters: Their names.
        base_model: The base model they share.
        total: Over all modules.
        kinds: By kind of module.
        products: <D_i, D_j> over all modules, float64, shape (N, N).
        telling: Where pairs conflict or are entangled.
        modules: Module by module (expert by expert); empty unless they were to be kept.
        whole_modules: Module → its matrices, all its experts together; empty like `modules`.
    """

    adapters: tuple[str, ...]
    base_model: str | None
    total: PairMatrices
    kinds: tuple[PairMatrices, ...]
    products: Tensor
    telling: Telling
    modules: tuple[PairMatrices, ...] = ()
    whole_modules: Mapping[str, PairMatrices] = field(default_factory=dict)

    def merged_norm(self, weights: Sequence[float]) -> float:
        """Frobenius norm of sum_i w_i D_i, from the inner products."""
        w = torch.tensor(weights, dtype=torch.float64)
        return math.sqrt(max(float(w @ self.products @ w), 0.0))

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

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; matrices of single modules only where they were kept."""
        document: dict[str, Any] = {
            "schema": 1,
            "adapters": list(self.adapters),
            "base_model": self.base_model,
            "total": self.total.to_dict(),
            "kinds": [kind.to_dict() for kind in self.kinds],
        }
        if self.modules:
            document["modules"] = [module.to_dict() for module in self.modules]
        return document


def compare(
    adapters: Sequence[Adapter],
    *,
    modules: Sequence[str] = (),
    angles: bool = False,
    per_module: bool = False,
    accept_base_models: bool = False,
    seed: int = 0,
    jobs: int | None = None,
    on_module: Callable[[], None] | None = None,
    on_matrices: Callable[[PairMatrices], None] | None = None,
) -> Comparison:
    """Compare all pairs of adapters, module by module, without dense deltas.

    Modules are summed up as they are read: memory is that of a few tables of N x N numbers.

    Args:
        adapters: At least two, of one base model.
        modules: Shell patterns; only modules that match one. Default: all.
        angles: Measure all principal cosines of every module, not only the largest.
        per_module: Keep every module's matrices: memory grows with modules x N x N.
        accept_base_models: Accept different base model names.
        seed: Of the sampled sign conflicts.
        jobs: Worker threads.
        on_module: Called after each module.
        on_matrices: Called with every module's (expert's) matrices, in order.

    Raises:
        MethodError: If there are fewer than two adapters, or the patterns match no module.
        AlignmentError: If they do not fit together.
        AdapterError: If a tensor is not finite; names adapter and module.
    """
    alignment = chosen_modules(adapters, modules, accept_base_models=accept_base_models)
    samples = min(max(_SAMPLES // len(alignment.modules), 256), 8192)
    specs = [spec for module in alignment.modules for spec in module.specs.values()]
    sixteen_bit = all(spec.dtype == "BF16" and spec.recipe.is_stored for spec in specs)
    dtype = torch.bfloat16 if sixteen_bit else torch.float32  # half the memory traffic

    def one(index: int) -> list[tuple[str, PairTables]]:
        return _compare_module(alignment, index, dtype, samples, seed, angles)

    sums = _Sums(alignment, per_module)
    with _bfloat16_products(sixteen_bit):
        for results in in_order(one, range(len(alignment.modules)), jobs=jobs):
            for name, tables in results:
                sums.add(name, tables, on_matrices)
            if on_module:
                on_module()
    return sums.comparison()


def chosen_modules(
    adapters: Sequence[Adapter], modules: Sequence[str], *, accept_base_models: bool
) -> Alignment:
    """The adapters side by side, with the modules that are to be compared; from headers.

    Raises:
        MethodError: If there are fewer than two adapters, or the patterns match no module.
        AlignmentError: If they do not fit together.
    """
    if len(adapters) < 2:
        raise MethodError("a comparison needs at least two adapters", "name another one")
    alignment = align(adapters, accept_base_models=accept_base_models)
    if not modules:
        return alignment
    chosen = set(select_names([m.name for m in alignment.modules], modules, "the adapters"))
    return replace(alignment, modules=tuple(m for m in alignment.modules if m.name in chosen))


def kinds_of(alignment: Alignment) -> dict[str, str]:
    """Module → label of its kind."""
    places = {module.name: place_of(module.name) for module in alignment.modules}
    names = labels(places.values())
    return {name: names[place.stack, place.kind] for name, place in places.items()}


class _Sums:
    """A comparison as it grows, module by module."""

    def __init__(self, alignment: Alignment, per_module: bool) -> None:
        self.alignment, self.per_module = alignment, per_module
        self.kind = kinds_of(alignment)
        self.total = PairSums()
        self.kinds: dict[str, PairSums] = {}
        self.wholes: dict[str, PairSums] = {}
        self.modules: list[PairMatrices] = []
        self.telling = Telling(len(alignment.adapters))

    def add(
        self, name: str, tables: PairTables, on_matrices: Callable[[PairMatrices], None] | None
    ) -> None:
        module = name.partition("[")[0]
        self.total.add(tables)
        self.kinds.setdefault(self.kind[module], PairSums()).add(tables)
        self.telling.add(name, tables)
        if not (self.per_module or on_matrices):
            return
        alone = PairSums()
        alone.add(tables)
        matrices = replace(
            matrices_of(name, alone), angles_out=tables.angles_out, angles_in=tables.angles_in
        )
        if on_matrices:
            on_matrices(matrices)
        if self.per_module:
            self.modules.append(matrices)
            self.wholes.setdefault(module, PairSums()).add(tables)

    def comparison(self) -> Comparison:
        return Comparison(
            adapters=tuple(a.name for a in self.alignment.adapters),
            base_model=self.alignment.base_model,
            total=matrices_of("all modules", self.total),
            kinds=tuple(matrices_of(label, sums) for label, sums in self.kinds.items()),
            products=self.total.tables["products"],
            telling=self.telling,
            modules=tuple(self.modules),
            whole_modules={name: matrices_of(name, sums) for name, sums in self.wholes.items()},
        )


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
