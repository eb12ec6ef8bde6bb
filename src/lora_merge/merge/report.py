"""What a merge did to each module, measured from Grams; plain data, nothing printed."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from math import sqrt
from typing import Any

from lora_merge.adapters.module_names import place_of
from lora_merge.printing import Report, Summary, notes, span


@dataclass(frozen=True)
class ModuleReport:
    """How far one module's result is from the exact weighted sum of the adapters.

    Attributes:
        name: Module path.
        num_units: Units that went in (R).
        rank: Units that came out.
        exact_norm: Frobenius norm of the exact sum.
        norm: Frobenius norm of the result.
        error_norm: Frobenius norm of their difference.
        adapter_norms: Frobenius norm of each adapter's weighted delta, in the plan's order; 0 for
            adapters that do not have the module.
        details: What the method adds, as JSON values; under "experts" one such mapping of each,
            where a module has several.
        full_norm: Frobenius norm of the result before it was cut to its rank.
        exact_norm_error: Standard error of `exact_norm`; 0 where it is exact.
    """

    name: str
    num_units: int
    rank: int
    exact_norm: float
    norm: float
    error_norm: float
    adapter_norms: tuple[float, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    full_norm: float | None = None
    exact_norm_error: float = 0.0

    @property
    def retained(self) -> float:
        """Share of the result's energy that the cut to its rank kept; 1 where nothing was cut."""
        return _retained([self])

    def said(self, name: str) -> list[Any]:
        """What the method added under a name: one value, or one of each expert; none if nothing."""
        parts = self.details.get("experts", [self.details])
        return [part[name] for part in parts if name in part]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            # Not asdict: it copies the members of every cluster, a tenth of a small merge's time.
            **{spec.name: getattr(self, spec.name) for spec in fields(self)},
            "retained_energy": self.retained,
            "relative_error": ratio(self.error_norm, self.exact_norm),
            "norm_ratio": ratio(self.norm, self.exact_norm),
        }


@dataclass(frozen=True)
class GroupReport:
    """Modules of one kind (say, every q_proj) taken together.

    Attributes:
        name: The kind.
        modules: How many.
        num_units: Smallest and largest number of units that went in.
        rank: Smallest and largest rank that came out.
        relative_error: Norm of all differences over the norm of all exact sums; None if both are 0.
        norm_ratio: Norm of all results over the norm of all exact sums; None if both are 0.
        retained: Share of the results' energy that the cut to their ranks kept.
        largest_clusters: (mean, largest) size of the modules' largest clusters, for clusterings.
    """

    name: str
    modules: int
    num_units: tuple[int, int]
    rank: tuple[int, int]
    relative_error: float | None
    norm_ratio: float | None
    retained: float
    largest_clusters: tuple[float, int] | None

    @classmethod
    def of(cls, name: str, modules: Sequence[ModuleReport]) -> "GroupReport":
        """Sum up some modules."""
        exact = sqrt(sum(m.exact_norm**2 for m in modules))
        largest = [max(sizes) for m in modules for sizes in m.said("cluster_sizes")]
        return cls(
            name=name,
            modules=len(modules),
            num_units=(min(m.num_units for m in modules), max(m.num_units for m in modules)),
            rank=(min(m.rank for m in modules), max(m.rank for m in modules)),
            relative_error=ratio(sqrt(sum(m.error_norm**2 for m in modules)), exact),
            norm_ratio=ratio(sqrt(sum(m.norm**2 for m in modules)), exact),
            retained=_retained(modules),
            largest_clusters=(sum(largest) / len(largest), max(largest)) if largest else None,
        )


@dataclass(frozen=True, repr=False)
class MergeReport(Report):
    """What a merge did.

    Attributes:
        modules: One report per module, in name order.
        notes: What the user should know, in words.
        out: The directory written, None for a merge in memory.
        num_bytes: Size of the weights file.
        scale: Factor on the merged delta that was used.
        scale_reason: Why, where it was left to the adapters.
    """

    modules: tuple[ModuleReport, ...]
    notes: tuple[str, ...]
    out: str | None
    num_bytes: int
    scale: float = 1.0
    scale_reason: str = ""

    def groups(self) -> list[GroupReport]:
        """The modules by kind, in order of first appearance."""
        kinds: dict[str, list[ModuleReport]] = {}
        for module in self.modules:
            kinds.setdefault(place_of(module.name).part, []).append(module)
        return [GroupReport.of(kind, members) for kind, members in kinds.items()]

    def summary(self) -> Summary:
        """Ranks, error and norm of the whole, and what to know."""
        total = self.total()
        error, norm = total.relative_error, total.norm_ratio
        facts = [
            (
                "merged",
                f"{total.modules} modules, {span(total.num_units)} units to rank "
                f"{span(total.rank)}",
            ),
            ("error", "-" if error is None else f"{100 * error:.1f} % of the exact sum"),
            ("norm", "-" if norm is None else f"{norm:.2f} of the exact sum's"),
        ]
        if self.out:
            facts.append(("written to", self.out))
        return Summary("Merge report", (*facts, *notes(self.notes)))

    def rows(self) -> list[dict[str, Any]]:
        """One row per module."""
        return [module.to_dict() for module in self.modules]

    def total(self) -> GroupReport:
        """All modules together."""
        return GroupReport.of("all modules", self.modules)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "schema": 1,
            "out": self.out,
            "bytes": self.num_bytes,
            "notes": list(self.notes),
            "scale": self.scale,
            "scale_reason": self.scale_reason,
            "total": asdict(self.total()),
            "groups": [asdict(group) for group in self.groups()],
            "modules": [module.to_dict() for module in self.modules],
        }


def _retained(modules: Sequence[ModuleReport]) -> float:
    kept = sum(m.norm**2 for m in modules)
    before = sum((m.norm if m.full_norm is None else m.full_norm) ** 2 for m in modules)
    return min(kept / before, 1.0) if before > 0 else 1.0


def ratio(part: float, whole: float) -> float | None:
    """`part / whole`; 0 for nothing of nothing, None where it has no meaning."""
    if whole == 0:
        return 0.0 if part == 0 else None
    return part / whole
