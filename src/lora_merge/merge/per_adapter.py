"""Parameters that an adapter has for itself: its density, say, by layer or by name."""

from collections.abc import Mapping, Sequence
from typing import Any

from lora_merge.adapters.adapter import Adapter
from lora_merge.adapters.alignment import Alignment
from lora_merge.adapters.module_names import count_layers
from lora_merge.errors import MethodError
from lora_merge.merge.methods.method import Method
from lora_merge.merge.recipe.by_module import ByModule


def split_parameters(
    method: Method,
    parameters: Mapping[str, Any],
    own: Sequence[Mapping[str, Any]] | None,
    adapters: Sequence[Adapter],
) -> tuple[dict[str, Any], list[dict[str, ByModule]]]:
    """The method's plain parameters, and what each adapter has for itself.

    A list among the method's parameters is every adapter's that does not say otherwise.
    """
    if own is None:
        own = [{}] * len(adapters)
    if len(own) != len(adapters):
        raise MethodError(
            f"parameters of {len(own)} adapters for {len(adapters)} adapters",
            "give one mapping per adapter, in their order",
        )
    varying = {
        name: value
        for name, value in parameters.items()
        if name in method.per_adapter and isinstance(value, list | tuple)
    }
    plain = {name: value for name, value in parameters.items() if name not in varying}
    found = []
    for adapter, given in zip(adapters, own, strict=True):
        foreign = [name for name in given if name not in method.per_adapter]
        if foreign:
            known = ", ".join(method.per_adapter) or "none"
            raise MethodError(
                f"{adapter.name}: method {method.name} takes no {foreign[0]!r} for single adapters",
                f"give it once, under parameters (for single adapters it takes: {known})",
            )
        found.append({n: ByModule.of(v, n) for n, v in {**varying, **given}.items()})
    return plain, found


def own_values(own: Mapping[str, ByModule], module: str, layers: int) -> dict[str, float]:
    """An adapter's own parameters in a module; those that no filter gives it are left out."""
    values = {name: value.at(module, layers) for name, value in own.items()}
    return {name: value for name, value in values.items() if value is not None}


def check_own(
    method: Method,
    parameters: Mapping[str, Any],
    own: Sequence[Mapping[str, ByModule]],
    alignment: Alignment,
) -> None:
    """Refuse what an adapter has for itself if it does not fit, somewhere, before any work."""
    layers = count_layers([m.name for m in alignment.modules])
    for adapter, values in zip(alignment.adapters, own, strict=True):
        cases = {
            tuple(own_values(values, module.name, layers).items())
            for module in alignment.modules
            if values
        }
        for case in sorted(cases):
            try:
                method.parse({**parameters, **dict(case)})
            except MethodError as error:
                raise MethodError(f"{adapter.name}: {error.message}", error.remedy) from error
