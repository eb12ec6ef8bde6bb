"""Adapters of one base model that were trained on different classes of it.

`model.layers.0` (a text model), `layers.0` (AutoModel), `model.language_model.layers.0` (the model
with its eyes) may all be one weight, and merging them under two names leaves each adapter alone.
"""

from collections.abc import Sequence

from lora_merge.adapters.adapter import Adapter
from lora_merge.adapters.identity.rename import Rename, renamed
from lora_merge.adapters.module_names import place_of

# transformers 4.52 changed where a text model stands inside a multimodal one; a model has one of
# the two, and PEFT reads the old names into the new class.
_OLD_NAMES = (
    Rename("language_model.model", "model.language_model"),
    Rename("language_model.lm_head", "lm_head"),
)
# Components that one class of a model has in its paths and another has not.
_CLASS_WORDS = frozenset(("model", "language_model", "text_model"))


def one_spelling(adapters: Sequence[Adapter]) -> list[Adapter]:
    """Give names that surely mean one module one spelling, where adapters differ in it."""
    present = [{change for change in _OLD_NAMES if _has(a, change.old)} for a in adapters]
    new = any(_has(adapter, _OLD_NAMES[0].new) for adapter in adapters)
    if not new or not any(present):
        return list(adapters)
    result = []
    for adapter, changes in zip(adapters, present, strict=True):
        for change in _OLD_NAMES:
            if change in changes:
                adapter = renamed(adapter, change)
        result.append(adapter)
    return result


def possible_twins(adapters: Sequence[Adapter]) -> tuple[list[str], str]:
    """Stacks of layers that may be one under two names.

    Returns:
        What was found, in words, and the remedy; nothing where names can be trusted.
    """
    found, remedy = [], ""
    stacks = [_stacks(adapter) for adapter in adapters]
    seen = set()
    for i, ours in enumerate(stacks):
        for j, theirs in enumerate(stacks[:i]):
            for one in sorted(ours.keys() - theirs.keys()):
                for other in sorted(theirs.keys() - ours.keys()):
                    pair = frozenset((one, other))
                    if pair in seen or not _may_be_one(one, other):
                        continue
                    if any(one in held and other in held for held in stacks):
                        continue  # an adapter that has both says that they are two
                    if _contradict(ours[one], theirs[other]):
                        continue
                    seen.add(pair)
                    short, long = sorted((one, other), key=lambda s: (s.count("."), s))
                    found.append(
                        f"{other or 'the layers'} ({adapters[j].name}) and {one or 'the layers'} "
                        f"({adapters[i].name}) may be one stack of layers under two names"
                    )
                    remedy = (
                        f"if they are one, --rename {short}={long} (or {long}={short}), whichever "
                        "the model has that the result is for"
                    )
    return found, remedy


def _has(adapter: Adapter, path: str) -> bool:
    return any(
        name == path or name.startswith(path + ".") for name in (*adapter.modules, *adapter.extras)
    )


def _stacks(adapter: Adapter) -> dict[str, dict[tuple[int, str], object]]:
    """Stack of layers → (layer, kind) → geometry."""
    stacks: dict[str, dict[tuple[int, str], object]] = {}
    for name, spec in adapter.modules.items():
        place = place_of(name)
        if place.layer is not None and place.stack:
            stacks.setdefault(place.stack, {})[place.layer, place.kind] = spec.geometry
    return stacks


def _may_be_one(one: str, other: str) -> bool:
    """Whether two stacks differ only by what a class of the model puts in front."""
    if one.endswith("." + other) or other.endswith("." + one):
        return True
    core, its = (
        tuple(part for part in stack.split(".") if part not in _CLASS_WORDS)
        for stack in (one, other)
    )
    return core == its


def _contradict(ours: dict[tuple[int, str], object], theirs: dict[tuple[int, str], object]) -> bool:
    """Whether a module that both have has two shapes, so that the stacks are two."""
    return any(ours[place] != theirs[place] for place in ours.keys() & theirs.keys())
