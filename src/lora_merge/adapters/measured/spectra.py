"""Exact singular values of every module's delta, scaling included, from the factors alone."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import fsum, sqrt
from typing import Any, Literal

import torch
from torch import Tensor

from lora_merge.adapters.adapter import Adapter
from lora_merge.adapters.forms import ModuleSpec, to_matrix
from lora_merge.adapters.module_names import Place, place_of
from lora_merge.adapters.patterns import select_names
from lora_merge.errors import AdapterError
from lora_merge.linalg.core_svd import CoreSVD, core_svd
from lora_merge.machine.parallel import in_order
from lora_merge.printing import Report, Summary, span
from lora_merge.ranks.measures import Measures, measure

Status = Literal["ok", "untrained", "zero", "not finite"]


@dataclass(frozen=True, eq=False)
class ModuleSpectrum:
    """The spectrum of one module (of one expert, where a module has several).

    Attributes:
        module: Module path in the base model.
        expert: Index of the expert, None for an ordinary module.
        spec: Shapes, rank, scaling and dtype of the module.
        values: Singular values of scaling * B @ A, descending, float64, shape (min(m, n, r),);
            empty where the factors are not finite.
        status: "untrained" if B is zero, "zero" if the delta is zero otherwise, "not finite" if
            the factors hold NaN or infinity.
        detail: What is not finite, in words.
        core: The SVD in factor space without the scaling, where it was asked for.
        delta_norm: Frobenius norm of the delta where `values` are weighted by data, else None.
    """

    module: str
    expert: int | None
    spec: ModuleSpec
    values: Tensor
    status: Status = "ok"
    detail: str = ""
    core: CoreSVD | None = field(default=None, repr=False)
    delta_norm: float | None = None

    @property
    def name(self) -> str:
        """Module path, with the expert's index where there are several."""
        return self.module if self.expert is None else f"{self.module}[{self.expert}]"

    @cached_property
    def place(self) -> Place:
        """Layer and kind."""
        return place_of(self.module)

    @cached_property
    def measures(self) -> Measures | None:
        """What the spectrum is like; None where the factors are not finite."""
        if self.status == "not finite":
            return None
        return measure(self.values, (self.spec.d_out, self.spec.d_in), self.spec.dtype)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        spec, measures = self.spec, self.measures
        return {
            "name": self.name,
            "layer": self.place.layer,
            "kind": self.place.kind,
            "form": spec.form,
            "shape": [spec.d_out, spec.d_in],
            "rank": spec.rank,
            "scaling": spec.scaling,
            "dtype": spec.dtype,
            "status": self.status,
            "detail": self.detail,
            "singular_values": self.values.tolist(),
            **(measures.to_dict() if measures else {}),
        }


@dataclass(frozen=True, eq=False, repr=False)
class AdapterSpectra(Report):
    """The spectra of one adapter.

    Attributes:
        adapter: Its name.
        base_model: Name of its base model.
        modules: In name order, experts by index.
    """

    adapter: str
    base_model: str | None
    modules: tuple[ModuleSpectrum, ...]

    @property
    def finite(self) -> tuple[ModuleSpectrum, ...]:
        """The modules that can be measured."""
        return tuple(m for m in self.modules if m.status != "not finite")

    @cached_property
    def by_module(self) -> Mapping[str, Tensor]:
        """Module → the spectrum that rank rules see.

        The experts of a module share its rank: their i-th energies are added, so that the energy
        beyond rank k is that of all of them together.
        """
        grouped: dict[str, list[Tensor]] = {}
        for module in self.finite:
            grouped.setdefault(module.module, []).append(module.values)
        return {
            name: parts[0] if len(parts) == 1 else torch.stack(parts).square().sum(0).sqrt()
            for name, parts in grouped.items()
        }

    @property
    def specs(self) -> Mapping[str, ModuleSpec]:
        """Module → its spec."""
        return {m.module: m.spec for m in self.finite}

    @property
    def costs(self) -> dict[str, int]:
        """Module → parameters per unit of rank."""
        return {n: s.num_experts * (s.d_in + s.d_out) for n, s in self.specs.items()}

    @property
    def ranks(self) -> dict[str, int]:
        """Module → rank it is stored with."""
        return {name: spec.rank for name, spec in self.specs.items()}

    @property
    def frobenius(self) -> float:
        """Norm of all deltas together."""
        return sqrt(fsum(float(m.values.square().sum()) for m in self.modules))

    def summary(self) -> Summary:
        """Norm, ranks stored, and ranks that would do."""
        measured = [m.measures for m in self.modules if m.measures is not None]
        stored = span(list(self.ranks.values()) or [0])
        erank = [measures.effective_rank for measures in measured] or [0.0]
        facts = [
            (
                "modules",
                f"{len(self.modules)}, stored rank {stored}",
            ),
            ("norm", f"{self.frobenius:.4g} (Frobenius, all deltas together)"),
            ("effective rank", f"{min(erank):.1f} to {max(erank):.1f}"),
        ]
        for level in sorted({level for measures in measured for level in measures.ranks_at}):
            ranks = span([measures.ranks_at[level] for measures in measured])
            facts.append((f"{100 * level:g} % energy", f"rank {ranks}"))
        odd = Counter(m.status for m in self.modules if m.status != "ok")
        facts += [("note", f"{count} modules are {status}") for status, count in odd.items()]
        return Summary(f"Spectra of {self.adapter}", tuple(facts))

    def rows(self) -> list[dict[str, Any]]:
        """One row per module, without the singular values themselves."""
        skipped = ("singular_values", "ranks_at")
        return [{k: v for k, v in m.to_dict().items() if k not in skipped} for m in self.modules]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "adapter": self.adapter,
            "base_model": self.base_model,
            "frobenius": self.frobenius,
            "parameters": sum(s.num_parameters for s in self.specs.values()),
            "modules": [module.to_dict() for module in self.modules],
        }


def adapter_spectra(
    adapter: Adapter,
    *,
    modules: Sequence[str] = (),
    keep_cores: bool = False,
    jobs: int | None = None,
    on_module: Callable[[], None] | None = None,
) -> AdapterSpectra:
    """Singular values of every module of an adapter; no dense delta is formed.

    Args:
        adapter: The adapter.
        modules: Patterns (`adapters.patterns`); only modules that match one. Default: all.
        keep_cores: Keep each module's r x r SVD, from which any truncation follows.
        jobs: Worker threads; default: the CPUs this process may use.
        on_module: Called after each module.

    Raises:
        MethodError: If a pattern matches no module.
        AdapterError: If the file cannot be read.
    """
    names = select_names(list(adapter.modules), modules, adapter.name)
    found: list[ModuleSpectrum] = []
    for spectra in in_order(lambda name: _spectra_of(adapter, name, keep_cores), names, jobs=jobs):
        found.extend(spectra)
        if on_module:
            on_module()
    return AdapterSpectra(adapter.name, adapter.config.base_model, tuple(found))


def require_finite(spectra: AdapterSpectra) -> None:
    """Refuse spectra of which a module is not finite.

    Raises:
        AdapterError: Naming adapter and module.
    """
    for module in spectra.modules:
        if module.status == "not finite":
            raise AdapterError(
                f"{spectra.adapter}: {module.name}: {module.detail}",
                "the training diverged or the file is damaged; leave this adapter out",
            )


def _spectra_of(adapter: Adapter, name: str, keep_core: bool) -> list[ModuleSpectrum]:
    spec = adapter.modules[name]
    a, b = adapter.read(name)
    return [
        _spectrum(name, expert if spec.num_experts > 1 else None, spec, a, b, keep_core)
        for expert in range(spec.num_experts)
    ]


def _spectrum(
    name: str, expert: int | None, spec: ModuleSpec, a: Tensor, b: Tensor, keep_core: bool
) -> ModuleSpectrum:
    down, up = to_matrix(spec, a, b, expert or 0)
    bad = ", ".join(
        f"lora_{letter} has {count} NaN or infinite entries"
        for letter, half in (("A", down), ("B", up))
        if (count := _count_bad(half))
    )
    if bad:
        return ModuleSpectrum(name, expert, spec, torch.zeros(0).double(), "not finite", bad)
    core = core_svd(up, down)
    values = core.values * abs(spec.scaling)
    status: Status = "ok"
    if float(values[0]) == 0:
        status = "untrained" if not bool(up.any()) else "zero"
    return ModuleSpectrum(name, expert, spec, values, status, core=core if keep_core else None)


def _count_bad(x: Tensor) -> int:
    """Entries that are NaN or infinite; a finite sum proves in one pass that there are none."""
    if bool(torch.isfinite(x.sum(dtype=torch.float32))):
        return 0
    return int((~torch.isfinite(x)).sum())
