"""Command-line options from the dataclass that the library function takes.

Name, kind, choices, limits, default and help are those of its fields (`lora_merge.options.option`),
so that a command can neither lag behind the library nor contradict it.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from typing import Any, Literal, TypeVar, get_args, get_origin

import click

from lora_merge.cli.shared.options import together
from lora_merge.options import bare_type

F = TypeVar("F", bound=Callable[..., Any])


def options_of(
    kind: type[Any],
    *,
    only: Collection[str] | None = None,
    without: Collection[str] = (),
    unset: bool = False,
    about: Mapping[str, str] | None = None,
) -> Callable[[F], F]:
    """Options for the fields of a dataclass, in their order, under the fields' names.

    Args:
        kind: Dataclass whose fields are made with `option`.
        only: The fields to show; default: all.
        without: Fields to leave out.
        unset: What is not given is None (flags: False); the field's default is shown all the same.
        about: Help texts that say more on a command line than the field's own.
    """
    shown = [
        _option(spec.name, spec.type, spec.default, spec.metadata, unset, (about or {}))
        for spec in fields(kind)
        if "about" in spec.metadata
        and spec.name not in without
        and (only is None or spec.name in only)
    ]
    return together(*shown)


def names_of(kind: type[Any]) -> tuple[str, ...]:
    """The names of the fields that `options_of` shows."""
    return tuple(spec.name for spec in fields(kind) if "about" in spec.metadata)


def _option(
    name: str,
    kind: Any,
    default: Any,
    metadata: Mapping[str, Any],
    unset: bool,
    about: Mapping[str, str],
) -> Callable[[F], F]:
    flag, kind = "--" + name.replace("_", "-"), bare_type(kind)
    text = about.get(name, str(metadata["about"]))
    first = text.split()[0]
    text = (text[:1].upper() + text[1:] if first.isalpha() else text).rstrip(".") + "."
    if kind is bool:
        if default is False:
            return click.option(flag, is_flag=True, help=text)
        return click.option(
            f"{flag}/--no-{flag[2:]}",
            default=None if unset else default,
            show_default=not unset,
            help=f"{text}  [default: yes]" if unset else text,
        )
    shown = None if unset else default
    words = default if unset else metadata.get("unset")
    if shown is None and words not in (None, ""):
        text = f"{text}  [default: {words}]"
    return click.option(
        flag, type=_type(kind, metadata), default=shown, show_default=shown is not None, help=text
    )


def _type(kind: Any, limits: Mapping[str, Any]) -> Any:
    if get_origin(kind) is Literal:
        return click.Choice(get_args(kind))
    if kind not in (int, float):
        return kind
    low, high = limits.get("low"), limits.get("high")
    above, below = limits.get("above"), limits.get("below")
    bounds: dict[str, Any] = {}
    if low is not None or above is not None:
        bounds |= {"min": low if above is None else above, "min_open": above is not None}
    if high is not None or below is not None:
        bounds |= {"max": high if below is None else below, "max_open": below is not None}
    if not bounds:
        return kind
    return click.IntRange(**bounds) if kind is int else click.FloatRange(**bounds)
