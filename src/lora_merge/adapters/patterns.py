"""Patterns of module names: one language, wherever a user chooses modules.

A text without `*`, `?` and `[` is a part of a name, as in mergekit's filters: `q_proj`, `mlp`,
`layers.3.` (the dot keeps layer 30 out). With one of them it is a shell pattern of the whole name,
of which the beginning may be left out: `3.*.q_proj` finds `model.layers.3.self_attn.q_proj`. `*`
alone is everything. What matches no module is an error: it is misspelt.
"""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from lora_merge.adapters.module_names import kind_of, place_of
from lora_merge.errors import MethodError


def matches(module: str, pattern: str) -> bool:
    """Whether a pattern stands for a module."""
    if not any(sign in pattern for sign in "*?["):
        return pattern in f"{module}.weight"  # mergekit's names are those of tensors
    return fnmatchcase(module, pattern) or fnmatchcase(module, f"*.{pattern}")


def matches_any(module: str, patterns: Iterable[str]) -> bool:
    """Whether one of some patterns stands for a module."""
    return any(matches(module, pattern) for pattern in patterns)


def select_names(names: Sequence[str], patterns: Sequence[str], owner: str) -> list[str]:
    """Names of the modules that match one of the patterns, all if there are none.

    Args:
        names: Module names.
        patterns: Patterns.
        owner: Whose modules they are, for the message.

    Raises:
        MethodError: If a pattern matches none.
    """
    refuse_unmatched(patterns, names, owner)
    return [name for name in names if not patterns or matches_any(name, patterns)]


def refuse_unmatched(patterns: Iterable[str], names: Sequence[str], owner: str) -> None:
    """Refuse a pattern that stands for no module.

    Args:
        patterns: Patterns.
        names: Module names.
        owner: Whose patterns they are, for the message.

    Raises:
        MethodError: Naming what comes near.
    """
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            raise MethodError(
                f"{owner}: no module matches {pattern!r}", nearest_names(pattern, names)
            )


def nearest_names(pattern: str, names: Sequence[str]) -> str:
    """What a pattern that matches nothing may have meant, as a remedy."""
    places = {place_of(name).kind for name in names}
    candidates = [*sorted({kind_of(name) for name in names}), *sorted(places), *names]
    near = get_close_matches(pattern.strip("*."), dict.fromkeys(candidates), n=3, cutoff=0.5)
    meant = f"did you mean {' or '.join(near)}? " if near else ""
    return f"{meant}its modules are named like {names[0]}" if names else "it has no modules"
