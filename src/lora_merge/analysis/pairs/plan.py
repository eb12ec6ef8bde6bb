"""What a comparison will take, from headers alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora_merge.adapters.adapter import Adapter
from lora_merge.adapters.aligned_module import AlignedModule
from lora_merge.analysis.compare import chosen_modules, kinds_of
from lora_merge.analysis.pairs.overlap import EXACT_UNITS, NUM_TABLES
from lora_merge.files.tensor_file import DTYPES
from lora_merge.machine.parallel import default_jobs
from lora_merge.printing import Report, Summary

# What Python, torch and the libraries for trees and tables take before anything is read.
PROCESS_BYTES = 280 << 20
# Bytes for each of the R x R numbers of a module: two Grams and what is made of them, in float64 up
# to 256 units and in float32 beyond; and what is worked on part by part.
_EXACT, _MANY, _PARTS = 40, 20, 12 << 20


@dataclass(frozen=True, repr=False)
class ComparisonPlan(Report):
    """A comparison that could be run.

    Attributes:
        adapters: How many.
        modules: How many.
        units: Units of the largest module, all adapters together.
        reads: Bytes of factors that will be read.
        working_bytes: Peak of one worker.
        result_bytes: Tables that are kept until the end.
        jobs: Workers.
    """

    adapters: int
    modules: int
    units: int
    reads: int
    working_bytes: int
    result_bytes: int
    jobs: int

    @property
    def pairs(self) -> int:
        """Pairs of adapters."""
        return self.adapters * (self.adapters - 1) // 2

    @property
    def peak_bytes(self) -> int:
        """About the peak of the process."""
        return PROCESS_BYTES + self.result_bytes + self.jobs * self.working_bytes

    def summary(self) -> Summary:
        """What is compared, and the memory it takes."""
        facts = [
            ("pairs", f"{self.pairs} of {self.adapters} adapters"),
            ("modules", f"{self.modules}, up to {self.units} units"),
            ("memory", f"about {self.peak_bytes / 1e6:.0f} MB with {self.jobs} workers"),
        ]
        return Summary("Comparison that could be run", tuple(facts))

    def rows(self) -> list[dict[str, Any]]:
        """One row."""
        return [self.to_dict()]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "schema": 1,
            "adapters": self.adapters,
            "pairs": self.pairs,
            "modules": self.modules,
            "units": self.units,
            "reads": self.reads,
            "jobs": self.jobs,
            "peak_bytes": self.peak_bytes,
        }


def plan_comparison(
    adapters: Sequence[Adapter],
    *,
    modules: Sequence[str] = (),
    angles: bool = False,
    per_module: bool = False,
    accept_base_models: bool = False,
    jobs: int | None = None,
) -> ComparisonPlan:
    """What `compare` of these adapters will take; the arguments are its own.

    Raises:
        MethodError: If there are fewer than two adapters, or the patterns match no module.
        AlignmentError: If they do not fit together.
    """
    alignment = chosen_modules(adapters, modules, accept_base_models=accept_base_models)
    count = len(adapters)
    kept = len(set(kinds_of(alignment).values())) + 2
    if per_module:
        kept += 2 * sum(module.first.num_experts for module in alignment.modules)
    tables = 8 * count**2 * NUM_TABLES

    def working(module: AlignedModule) -> int:
        widest = max(spec.rank for spec in module.specs.values())
        units = len(module.specs) * widest
        each = _MANY if module.num_units > EXACT_UNITS else _EXACT
        stack = module.stack_bytes() // module.first.num_experts
        cosines = 2 * 8 * count**2 * widest if angles else 0
        return stack + each * units**2 + tables + cosines + _PARTS

    return ComparisonPlan(
        adapters=count,
        modules=len(alignment.modules),
        units=max(module.num_units for module in alignment.modules),
        reads=read_bytes(alignment.modules),
        working_bytes=max(working(module) for module in alignment.modules),
        result_bytes=kept * tables,
        jobs=jobs or default_jobs(),
    )


def read_bytes(modules: Sequence[AlignedModule]) -> int:
    """Bytes of all factors of some modules, as stored."""
    return sum(
        spec.num_parameters * DTYPES[spec.dtype].itemsize
        for module in modules
        for spec in module.specs.values()
    )
