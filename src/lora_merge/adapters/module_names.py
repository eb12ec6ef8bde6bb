"""Where a module sits in a model: which stack of layers, which layer, which kind."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# What PEFT calls the module inside its wrapper.
WRAPPED = "base_layer"
_NUMBERS = re.compile(r"(?:^|\.)\d+\.")
_LAYER = re.compile(r"^(?P<stack>.*?)(?:^|\.)(?P<layer>\d+)(?:\.(?P<kind>.+)|$)")


@dataclass(frozen=True, order=True)
class Place:
    """A module's place.

    Attributes:
        stack: What stands before the layer number ("model.layers"), "" without one.
        layer: The first number in the path, None without one.
        kind: What stands after it ("self_attn.q_proj"), the whole name where there is no
            number, the last part of the stack for a whole layer.
    """

    stack: str
    layer: int | None
    kind: str

    @property
    def part(self) -> str:
        """What stands after the last number: one name for a projection of all experts."""
        return _NUMBERS.split(self.kind)[-1] or self.kind


def place_of(module: str) -> Place:
    """Read a module's place from its name."""
    match = _LAYER.match(module)
    if match is None:
        return Place("", None, module)
    kind = match["kind"] or match["stack"].rpartition(".")[2] or module
    return Place(match["stack"], int(match["layer"]), kind)


def count_layers(modules: Iterable[str]) -> int:
    """One more than the last layer's number; 0 if there are no layers."""
    return max((n + 1 for m in modules if (n := place_of(m).layer) is not None), default=0)


def labels(places: Iterable[Place]) -> dict[tuple[str, str], str]:
    """Short names of (stack, kind): the shortest tail of the kind that no other kind ends in.

    Where a model has several stacks of layers, theirs is put in front ("encoder:query").
    """
    keys = sorted({(p.stack, p.kind) for p in places})
    kinds = {kind for _, kind in keys}
    numbered = sorted({p.stack for p in places if p.layer is not None})
    short = {kind: _short(kind, kinds) for kind in kinds}
    heads = dict(zip(numbered, _heads(numbered), strict=True)) if len(numbered) > 1 else {}
    return {
        (stack, kind): f"{heads[stack]}:{short[kind]}" if stack in heads else short[kind]
        for stack, kind in keys
    }


def _short(kind: str, kinds: Iterable[str]) -> str:
    parts = kind.split(".")
    for count in range(1, len(parts)):
        tail = ".".join(parts[-count:])
        if sum(other == tail or other.endswith("." + tail) for other in kinds) == 1:
            return tail
    return kind


def _heads(stacks: Sequence[str]) -> list[str]:
    """What tells stacks apart: the first component in which they differ."""
    split = [stack.split(".") for stack in stacks]
    for index in range(min(map(len, split))):
        column = [parts[index] for parts in split]
        if len(set(column)) == len(column):
            return column
    return list(stacks)


def unwrapped(name: str) -> str:
    """A name in the base model: without the wrappers of PEFT that an adapted module is inside."""
    return ".".join(part for part in name.split(".") if part != WRAPPED)


def layer_of(module: str) -> str:
    """The layer a module belongs to: its path up to the first number."""
    place = place_of(module)
    if place.layer is None:
        return module
    return f"{place.stack.rpartition('.')[2]}.{place.layer}".removeprefix(".")


def kind_of(module: str) -> str:
    """The last part of a module's path."""
    return module.rpartition(".")[2]


def natural(names: Iterable[str]) -> list[str]:
    """Sorted with numbers as numbers: layer 2 before layer 10."""

    def key(name: str) -> list[tuple[bool, int, str]]:
        # A number stands before a word: the two cannot be compared.
        return [(not p.isdigit(), int(p) if p.isdigit() else 0, p) for p in name.split(".")]

    return sorted(names, key=key)
