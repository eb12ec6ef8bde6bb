"""Weights that a caller names, as one row of numbers."""

from collections.abc import Mapping, Sequence

from lora_merge.errors import MethodError


def weight_row(
    names: Sequence[str], wanted: str | Mapping[str, float] | Sequence[float] | None
) -> list[float]:
    """One weight per expert.

    Args:
        names: Of the experts.
        wanted: One expert's name (weight 1), weights by name (others 0), one weight per expert, or
            None for the base model.

    Raises:
        MethodError: If a name is unknown, or the number of weights is wrong.
    """
    if wanted is None:
        return [0.0] * len(names)
    if isinstance(wanted, str):
        wanted = {wanted: 1.0}
    if isinstance(wanted, Mapping):
        unknown = [name for name in wanted if name not in names]
        if unknown:
            raise MethodError(f"no expert is called {unknown[0]!r}", f"one of {', '.join(names)}")
        return [float(wanted.get(name, 0.0)) for name in names]
    if len(wanted) != len(names):
        raise MethodError(
            f"{len(wanted)} weights for {len(names)} experts", "give one weight per expert"
        )
    return [float(value) for value in wanted]
