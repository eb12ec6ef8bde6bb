"""Numbers by module: constants, gradients over layers, filters on names, in mergekit's words."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np

from lora_merge.adapters.module_names import place_of
from lora_merge.adapters.patterns import matches, refuse_unmatched
from lora_merge.errors import MethodError


@dataclass(frozen=True)
class Filtered:
    """A value for the modules that a filter matches.

    Attributes:
        filter: Pattern of module names (`adapters.patterns`); None matches all.
        value: A number, or numbers spread over the layers.
    """

    filter: str | None
    value: float | tuple[float, ...]

    def matches(self, module: str) -> bool:
        """Whether this value is for the module."""
        return self.filter is None or matches(module, self.filter)


@dataclass(frozen=True)
class ByModule:
    """A number as a function of the module: an adapter's weight, its density.

    Attributes:
        cases: The first that matches decides.
    """

    cases: tuple[Filtered, ...]

    @classmethod
    def of(cls, value: Any, what: str = "weight") -> "ByModule":
        """From a number, a list of numbers, or a list of {filter, value}; `what` it is.

        Raises:
            MethodError: If it is none of these.
        """
        if isinstance(value, ByModule):
            return value
        if isinstance(value, Sequence) and value and all(isinstance(v, Mapping) for v in value):
            return cls(tuple(_case(entry, what) for entry in value))
        return cls((Filtered(None, _number_or_gradient(value, what)),))

    @property
    def constant(self) -> float | None:
        """The number, if it is the same for all modules."""
        first = self.cases[0]
        if first.filter is None and isinstance(first.value, float):
            return first.value
        return None

    @property
    def numbers(self) -> list[float]:
        """Every number in it."""
        return [
            number
            for case in self.cases
            for number in (case.value if isinstance(case.value, tuple) else (case.value,))
        ]

    def at(self, module: str, num_layers: int) -> float | None:
        """The number in a module of a model with this many layers; None where no filter matches."""
        value = next((c.value for c in self.cases if c.matches(module)), None)
        if value is None or isinstance(value, float):
            return value
        places = np.linspace(0, 1, len(value))
        return float(np.interp(_depth(module, num_layers), places, value))

    def __str__(self) -> str:
        return "by module" if self.constant is None else f"{self.constant:g}"

    def to_data(self) -> Any:
        """As plain YAML values."""
        if self.constant is not None:
            return self.constant
        plain = [
            {
                **({"filter": c.filter} if c.filter is not None else {}),
                "value": list(c.value) if isinstance(c.value, tuple) else c.value,
            }
            for c in self.cases
        ]
        return plain[0]["value"] if len(plain) == 1 and "filter" not in plain[0] else plain


def refuse_unmatched_filters(
    values: Iterable[ByModule], modules: Sequence[str], owner: str
) -> None:
    """Refuse filters that no module matches: what they were to decide would not happen.

    Raises:
        MethodError: Naming the adapter, the filter and names that come near.
    """
    filters = [case.filter for value in values for case in value.cases if case.filter is not None]
    refuse_unmatched(filters, modules, owner)


def _depth(module: str, num_layers: int) -> float:
    """0 at the first layer and before it (embeddings), 1 at the last one and after it (heads)."""
    layer = place_of(module).layer
    if layer is None:
        return 0.0 if "emb" in module or "wte" in module else 1.0
    return layer / (num_layers - 1) if num_layers > 1 else 0.0


def _case(entry: Mapping[str, Any], what: str) -> Filtered:
    unknown = set(entry) - {"filter", "value"}
    if unknown or "value" not in entry:
        raise MethodError(
            f"{dict(entry)!r} is no {what}", "write {filter: part of a name, value: number}"
        )
    pattern = entry.get("filter")
    everything = pattern is None or pattern == "*"
    value = _number_or_gradient(entry["value"], what)
    return Filtered(None if everything else str(pattern), value)


def _number_or_gradient(value: Any, what: str) -> float | tuple[float, ...]:
    if isinstance(value, Sequence) and not isinstance(value, str) and value:
        return tuple(_number(v, what) for v in value)
    return _number(value, what)


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        raise MethodError(
            f"{value!r} is no {what}",
            f"a {what} is a finite number, a list of them over the layers, or {{filter, value}}",
        )
    return float(value)
