"""Fields of options dataclasses: checks, help, command lines and documents follow from them."""

from collections.abc import Collection, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from difflib import get_close_matches
from math import isfinite
from os import PathLike
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from lora_merge.errors import MethodError

T = TypeVar("T")
# `Literal[...] | None` is a typing.Union, `int | None` a types.UnionType.
_UNIONS = (Union, UnionType)


@dataclass(frozen=True)
class NoOptions:
    """The parameters of a method that has none."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method, for help texts and tables.

    Attributes:
        name: Its name in recipes.
        kind: Its type in words, or its choices.
        default: What it is if not given.
        limits: Its range in words, "" if any value will do.
        about: What it does.
    """

    name: str
    kind: str
    default: Any
    limits: str
    about: str


LARGEST_SEED = 2**32 - 1  # what torch, NumPy and Optuna all take


def option(
    default: Any,
    about: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    unset: str = "",
    flags: tuple[str, ...] = (),
    metavar: str | None = None,
    switch: bool = False,
) -> Any:
    """A field of an options dataclass: default, one line of help, inclusive limits.

    Args:
        default: Value if not given.
        about: What the parameter does, in a line.
        low: Smallest value.
        high: Largest value.
        above: Largest value that is too small.
        below: Smallest value that is too large.
        unset: What None stands for, in words.
        flags: How a command line spells it; default: --its-name.
        metavar: What a command line calls its value.
        switch: Of two choices: a command line has a switch to the one that is no default.
    """
    said = {"about": about, "unset": unset, "flags": flags, "metavar": metavar, "switch": switch}
    limits = {"low": low, "high": high, "above": above, "below": below}
    return field(default=default, metadata={**said, **limits})


def argument(default: Any, about: str) -> Any:
    """A field that no command line has: an object, a callback."""
    return field(default=default, metadata={"about": about, "shown": False})


@dataclass(frozen=True)
class Needed:
    """Of a field without a default: `Annotated[kind, Needed("what it is")]`.

    Attributes:
        about: What the parameter does, in a line.
        flags: How a command line spells it; none of a field that no option gives.
        low: Smallest value.
    """

    about: str
    flags: tuple[str, ...] = ()
    low: float | None = None


def said_of(spec: Field[Any]) -> Mapping[str, Any]:
    """What `option`, `argument` or `Needed` says of a field; nothing of another field."""
    for said in getattr(spec.type, "__metadata__", ()):
        if isinstance(said, Needed):
            return {**said.__dict__, "shown": bool(said.flags), "needed": True, "metavar": None}
    return spec.metadata


def about_of(spec: Field[Any]) -> str:
    """What a field is for, as a sentence."""
    return sentence(str(said_of(spec)["about"]))


def sentence(text: str) -> str:
    """A capital letter, unless the first word is a name, and one full stop."""
    first = text.split()[0]
    text = text[:1].upper() + text[1:] if first.isalpha() else text
    return text if text.endswith(".") else f"{text}."


def in_order(kind: type[Any]) -> list[Field[Any]]:
    """A dataclass's fields in the order of its arguments."""
    return sorted(fields(kind), key=lambda spec: bool(spec.kw_only))


def is_shown(spec: Field[Any]) -> bool:
    """Whether a command line has the field."""
    said = said_of(spec)
    return "about" in said and bool(said.get("shown", True))


def parse_options(
    kind: type[T], given: Mapping[str, Any], owner: str, without: Collection[str] = ()
) -> T:
    """Named values as an options object.

    Args:
        kind: Frozen dataclass whose fields are made with `option`.
        given: Values by name.
        owner: Whose parameters they are, for messages ("method ties").
        without: Fields that this owner does not look at.

    Raises:
        MethodError: On an unknown name (with the nearest one) or a value out of range.
    """
    known = {f.name: f for f in fields(kind) if f.name not in without}  # type: ignore[arg-type]
    for name, value in given.items():
        if name not in known:
            near = get_close_matches(name, known, n=1)
            names = f"it has: {', '.join(known)}" if known else "it has none"
            raise MethodError(
                f"{owner} has no parameter {name!r}",
                f"did you mean {near[0]!r}?" if near else names,
            )
        _check(owner, name, known[name].type, known[name].metadata, value)
    return kind(**given)


def check_options(values: Any, owner: str) -> None:
    """Refuse an options object that was made without `parse_options`.

    Raises:
        MethodError: On a value of the wrong kind or out of range.
    """
    for spec in fields(values):
        kind = get_args(spec.type)[0] if get_origin(spec.type) is Annotated else spec.type
        if is_shown(spec) and is_plain(kind):
            _check(owner, spec.name, kind, said_of(spec), getattr(values, spec.name))


def describe_options(
    kind: type[Any], presets: Mapping[str, Any] | None = None, without: Collection[str] = ()
) -> list[Parameter]:
    """Every parameter of an options dataclass but some, with a preset's defaults in place."""
    presets = presets or {}
    return [
        Parameter(
            name=f.name,
            kind=_kind_text(f.type),
            default=presets.get(f.name, None if f.default is MISSING else f.default),
            limits=_limits_text(f.metadata),
            about=str(f.metadata.get("about", "")),
        )
        for f in fields(kind)
        if f.name not in without
    ]


def bare_type(kind: Any) -> Any:
    """A field's type without None and without what is said of it."""
    if get_origin(kind) is Annotated:
        return bare_type(get_args(kind)[0])
    if get_origin(kind) in _UNIONS:
        return next(k for k in get_args(kind) if k is not NoneType)
    return kind


def is_plain(kind: Any) -> bool:
    """Whether a field holds one number, switch, text or word of a list: what can be checked."""
    parts = get_args(kind) if get_origin(kind) in _UNIONS else (kind,)
    plain = (bool, int, float, str, NoneType)
    return all(part in plain or get_origin(part) is Literal for part in parts)


def _check(owner: str, name: str, kind: Any, limits: Mapping[str, Any], value: Any) -> None:
    if value is None and NoneType in get_args(kind):
        return
    if any(value in get_args(k) for k in get_args(kind) if get_origin(k) is Literal):
        return
    kind = bare_type(kind)
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            near = get_close_matches(str(value), get_args(kind), n=1)
            choices = f"choose from: {', '.join(get_args(kind))}"
            said = f"did you mean {near[0]!r}?" if near else choices
            raise MethodError(f"{owner}: {name} is {value!r}", said)
        return
    if kind is str and isinstance(value, PathLike):
        return
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise MethodError(f"{owner}: {name} is {value!r}, not {kind.__name__}", "correct it")
    low, high = limits.get("low"), limits.get("high")
    above, below = limits.get("above"), limits.get("below")
    if isinstance(value, float) and not isfinite(value):
        raise MethodError(f"{owner}: {name} is {value!r}", "it must be a finite number")
    fits = (
        (low is None or value >= low)
        and (high is None or value <= high)
        and (above is None or value > above)
        and (below is None or value < below)
    )
    if not fits:
        raise MethodError(f"{owner}: {name} is {value!r}", f"it must be {_limits_text(limits)}")


def _kind_text(kind: Any) -> str:
    if get_origin(kind) in _UNIONS:
        return " or ".join(_kind_text(k) for k in get_args(kind) if k is not NoneType)
    if get_origin(kind) is Literal:
        return " | ".join(get_args(kind))
    return {"bool": "yes or no", "int": "whole number", "float": "number", "str": "text"}[
        kind.__name__
    ]


def _limits_text(limits: Mapping[str, Any]) -> str:
    low, high = limits.get("low"), limits.get("high")
    above, below = limits.get("above"), limits.get("below")
    parts = []
    if low is not None:
        parts.append(f"at least {low:g}")
    if above is not None:
        parts.append(f"above {above:g}")
    if high is not None:
        parts.append(f"at most {high:g}")
    if below is not None:
        parts.append(f"below {below:g}")
    return ", ".join(parts)
