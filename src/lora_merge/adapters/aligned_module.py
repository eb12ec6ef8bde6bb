"""One module and the adapters that touch it."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from lora_merge.adapters.forms import ModuleSpec


@dataclass(frozen=True, eq=False)
class AlignedModule:
    """One module and the adapters that touch it.

    Attributes:
        name: Module path in the base model.
        specs: Index of an adapter → its spec of the module, ascending; absent adapters are left
            out (they add nothing to this module).
    """

    name: str
    specs: Mapping[int, ModuleSpec]

    @property
    def first(self) -> ModuleSpec:
        """Any spec: the geometry is the same in all."""
        return next(iter(self.specs.values()))

    @property
    def num_units(self) -> int:
        """R, the units of all adapters together (of one expert)."""
        return sum(spec.rank for spec in self.specs.values())

    def restricted(self, adapters: Collection[int]) -> "AlignedModule":
        """The same module for some of the adapters that touch it, under their old numbers."""
        return AlignedModule(self.name, {i: s for i, s in self.specs.items() if i in adapters})

    def stack_bytes(self, itemsize: int = 4) -> int:
        """Memory of this module's stack, all experts together."""
        spec = self.first
        return spec.num_experts * self.num_units * (spec.d_in + spec.d_out) * itemsize
