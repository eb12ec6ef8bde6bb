"""Arguments of public functions: a wrong keyword is an error that says what was meant."""

import inspect
import textwrap
from collections.abc import Callable, Collection, Iterable, Mapping
from difflib import get_close_matches
from functools import wraps
from typing import Annotated, Any, ForwardRef, ParamSpec, TypeVar, get_args, get_origin

from lora_merge.errors import ArgumentError
from lora_merge.options import about_of, check_options, in_order

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


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
        lora_merge.errors.ArgumentError: resize() has no argument 'maxrank'
          try: did you mean 'max_rank'?
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        name = getattr(function, "__name__", "it")
        known = list(inspect.signature(function).parameters)

        @wraps(function)
        def call(*arguments: P.args, **keywords: P.kwargs) -> R:
            _refuse_unknown(name, keywords, known, hint)
            return function(*arguments, **keywords)

        return call

    return decorate


def takes(
    kind: Callable[P, T], hint: Callable[[str, Any], str] | None = None
) -> Callable[[Callable[[T], R]], Callable[P, R]]:
    """A function of one options object as a function of its fields.

    A dataclass is the one list of a function's arguments: signature, documentation, checks and the
    command's options are made of it. Type checkers see its fields as the function's arguments.

    Args:
        kind: Frozen dataclass; fields without a default are `Annotated[type, "what it is"]`.
        hint: As for `checked`.

    Examples:
        >>> from dataclasses import dataclass
        >>> from lora_merge.options import option
        >>> @dataclass(frozen=True, kw_only=True)
        ... class Cut:
        ...     rank: int = option(8, "rank of the result", low=1)
        >>> @takes(Cut)
        ... def cut(given: Cut) -> int:
        ...     return given.rank
        >>> cut(rank=4)
        4
        >>> cut(rank=0)
        Traceback (most recent call last):
        lora_merge.errors.MethodError: cut: rank is 0
          try: it must be at least 1
    """

    def decorate(function: Callable[[T], R]) -> Callable[P, R]:
        name = getattr(function, "__name__", "it")
        signature = _signature(kind)

        @wraps(function)
        def call(*arguments: P.args, **keywords: P.kwargs) -> R:
            _refuse_unknown(name, keywords, signature.parameters, hint)
            try:
                signature.bind(*arguments, **keywords)
            except TypeError as error:
                raise ArgumentError(f"{name}(): {error}", "see its documentation") from None
            given = kind(*arguments, **keywords)
            check_options(given, name)
            return function(given)

        returned = inspect.signature(function).return_annotation
        call.__signature__ = signature.replace(return_annotation=returned)  # type: ignore[attr-defined]
        call.__doc__ = _documented(function.__doc__ or "", kind)
        del call.__wrapped__  # tools of documentation would show it
        return call

    return decorate


def _signature(kind: Any) -> inspect.Signature:
    """A dataclass's signature, without what is said of its fields."""
    given = inspect.signature(kind)
    plain = [one.replace(annotation=_bare(one.annotation)) for one in given.parameters.values()]
    return given.replace(parameters=plain)


def _bare(annotation: Any) -> Any:
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    return annotation.__forward_arg__ if isinstance(annotation, ForwardRef) else annotation


def _refuse_unknown(
    name: str,
    keywords: Mapping[str, Any],
    known: Collection[str],
    hint: Callable[[str, Any], str] | None,
) -> None:
    for word, value in keywords.items():
        if word not in known:
            said = (hint(word, value) if hint else "") or nearest(word, known)
            raise ArgumentError(f"{name}() has no argument {word!r}", said)


def _documented(text: str, kind: Any) -> str:
    """A docstring with the fields as its section of arguments, before what is returned."""
    lines = inspect.cleandoc(text).split("\n")
    sections = ("Returns:", "Raises:", "Examples:")
    place = next((i for i, line in enumerate(lines) if line in sections), len(lines))
    said = ["Args:"]
    for spec in in_order(kind):
        about = about_of(spec)
        if unset := spec.metadata.get("unset"):
            about += f" Default: {unset}."
        said += textwrap.wrap(
            f"{spec.name}: {about}", 96, initial_indent="    ", subsequent_indent=8 * " "
        )
    return "\n".join([*lines[:place], *said, "", *lines[place:]])
