"""The keys and values that a recorded step reads and writes, by layer and attribute."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor


class MovedError(Exception):
    """A step changed more of a cache than the entries of its tensors."""


def state_of(layer: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of a cache's layer, and what else it knows."""
    known = vars(layer)
    tensors = {name: value for name, value in known.items() if isinstance(value, Tensor)}
    return tensors, {name: value for name, value in known.items() if name not in tensors}


@contextmanager
def left_alone(cache: Any) -> Iterator[Callable[[], None]]:
    """Give the cache back as it was, whatever a trial run writes; yields a look at what it did."""

    def check_left() -> None:
        for layer, tensors, rest in before:
            new, other = state_of(layer)
            same = new.keys() == tensors.keys() and all(new[n] is tensors[n] for n in new)
            if not same or other != rest:
                raise MovedError(
                    f"{type(layer).__name__} changes more than the entries of its tensors"
                )

    before = [(layer, *state_of(layer)) for layer in cache.layers]
    saved = [{name: tensor.clone() for name, tensor in tensors.items()} for _, tensors, _ in before]
    try:
        yield check_left
    finally:
        for (layer, tensors, rest), copies in zip(before, saved, strict=True):
            vars(layer).update(rest)
            for name, tensor in tensors.items():
                tensor.copy_(copies[name])
                setattr(layer, name, tensor)
