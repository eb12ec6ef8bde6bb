"""Arguments of public functions: a wrong keyword is an error that says what was meant."""

import inspect
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from lora_merge.errors import LoraMergeError

P = ParamSpec("P")
R = TypeVar("R")


class ArgumentError(LoraMergeError, TypeError):
    """A function was called with an argument that it does not have."""


def nearest(word: str, known: Iterable[str]) -> str:
    """The remedy for a word that is none of the known ones."""
    words = sorted(known)
    near = get_close_matches(word, words, n=1)
    return f"did you mean {near[0]!r}?" if near else f"it is one of: {', '.join(words)}"


def checked(
    hint: Callable[[str, Any], str] | None = None,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Tell a wrong keyword by name, with the nearest right one; the signature stays the real one.

    Args:
        hint: (keyword, value) → a better remedy where the function knows one, or "".

    Examples:
        >>> @checked()
        ... def resize(adapter: str, *, max_rank: int = 8) -> None: ...
        >>> resize("math", maxrank=4)
        Traceback (most recent call last):
        lora_merge.arguments.ArgumentError: resize() has no argument 'maxrank'
          try: did you mean 'max_rank'?
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        name = getattr(function, "__name__", "it")
        known = list(inspect.signature(function).parameters)

        @wraps(function)
        def call(*arguments: P.args, **keywords: P.kwargs) -> R:
            for word, value in keywords.items():
                if word not in known:
                    said = (hint(word, value) if hint else "") or nearest(word, known)
                    raise ArgumentError(f"{name}() has no argument {word!r}", said)
            return function(*arguments, **keywords)

        return call

    return decorate
