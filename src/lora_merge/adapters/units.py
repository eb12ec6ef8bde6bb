"""Recipes: from the tensors a file stores to rank-one units."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

Units = tuple[Tensor, Tensor]

# "exact": the delta is the format's own; "exact-with-base": so it is, once the base weight is read;
# "approximate": the format's delta is of full rank, and what is kept is its best part of this rank.
Verdict = Literal["exact", "exact-with-base", "approximate"]


class BaseWeight(Protocol):
    """The base weight of one module as a (d_out, d_in) matrix W, float32, read when it is used."""

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        ...

    def times(self, x: Tensor) -> Tensor:
        """W @ x; W is streamed in blocks of rows."""
        ...

    def transposed_times(self, x: Tensor) -> Tensor:
        """W.T @ x; W is streamed in blocks of rows."""
        ...

    def dense(self) -> Tensor:
        """All of W."""
        ...


def as_stored(a: Tensor, b: Tensor) -> Units:
    """A and B as the file has them."""
    return a, b


@dataclass(frozen=True)
class Recipe:
    """How one module's stored tensors become its factors A and B.

    Attributes:
        keys: Names of the stored tensors, in the order in which `units` takes them. One tensor may
            stand in the recipes of many modules.
        units: Pure function from these tensors to (A, B) in the layout of the module's form
            (`forms.py`), without the module's scaling and with exactly `ModuleSpec.rank` units per
            expert. With `needs_base` it takes `base=` too, the module's `BaseWeight`.
        verdict: How far the result is the format's own delta.
        needs_base: Whether the base weight takes part.
        whole_norm: Frobenius norm of the format's own delta from the same tensors, where `units`
            gives the best part of it alone; None where it gives all.
    """

    keys: tuple[str, ...]
    units: Callable[..., Units] = as_stored
    verdict: Verdict = "exact"
    needs_base: bool = False
    whole_norm: Callable[..., float] | None = None

    @property
    def is_stored(self) -> bool:
        """Whether A and B are tensors of the file: no arithmetic, no change of dtype."""
        return self.units is as_stored

    def build(
        self, read: Callable[[str], Tensor], base: Callable[[], BaseWeight] | None = None
    ) -> Units:
        """Read the tensors and make (A, B) of them.

        Args:
            read: Gives a stored tensor by its name.
            base: Gives the module's base weight; called only if the recipe needs it.
        """
        tensors = [read(key) for key in self.keys]
        if not self.needs_base:
            return self.units(*tensors)
        if base is None:
            raise ValueError(f"{self.keys[0]}: opened without the base weights it needs")
        return self.units(*tensors, base=base())
