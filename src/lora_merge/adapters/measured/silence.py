"""Why an adapter changes nothing, where it does not."""

from collections.abc import Iterable

from lora_merge.adapters.adapter import Adapter


def why_silent(adapter: Adapter, modules: Iterable[str], weights: Iterable[float] = (1.0,)) -> str:
    """The reason that an adapter's delta is zero in some modules; reads their factors.

    Args:
        adapter: The adapter.
        modules: Names of its modules.
        weights: What it is multiplied with.

    Example:
        >>> import lora_merge
        >>> adapter = lora_merge.open_adapter("examples/adapters/upper")
        >>> why_silent(adapter, adapter.modules, [0.0])
        'its weight is 0'
    """
    names, largest = list(modules), max(map(abs, weights), default=0.0)
    if largest == 0:
        return "its weight is 0"
    if not any(adapter.modules[name].scaling for name in names):
        return "its alpha is 0"
    stored = [adapter.read(name) for name in names]
    if not any(bool(b.any()) for _, b in stored):
        return "its B is zero, as before training"
    if not any(bool(a.any()) for a, _ in stored):
        return "its A is zero"
    return f"its numbers vanish at a weight of {largest:.3g}"
