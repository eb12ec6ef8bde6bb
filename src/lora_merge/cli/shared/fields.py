"""Command-line options from the dataclass that the library function takes.

Name, kind, choices, limits, default and help are those of its fields (`lora_merge.options.option`),
so that a command can neither lag behind the library nor contradict it.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, fields
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, ForwardRef, Literal, TypeVar, get_args, get_origin

import click

from lora_merge.cli.shared.options import Choice, together
from lora_merge.options import bare_type, in_order, is_shown, said_of, sentence

F = TypeVar("F", bound=Callable[..., Any])


def options_of(
    kind: type[Any],
    *,
    only: Collection[str] | None = None,
    without: Collection[str] = (),
    unset: bool = False,
    about: Mapping[str, str] | None = None,
    defaults: Mapping[str, Any] | None = None,
    needed: bool = True,
) -> Callable[[F], F]:
    """Options for the fields of a dataclass, in their order, under the fields' names.

    Args:
        kind: Dataclass whose fields are made with `option`.
        only: The fields to show; default: all.
        without: Fields to leave out.
        unset: What is not given is None (flags: False); the field's default is shown all the same.
        about: Help texts that a command line has in the place of the field's own.
        defaults: Likewise of defaults.
        needed: Whether fields without a default must be given.
    """
    shown = [
        _option(
            spec.name,
            spec.type,
            (defaults or {}).get(spec.name, spec.default),
            {**said_of(spec)} if needed else {**said_of(spec), "needed": None},
            unset,
            about or {},
        )
        for spec in in_order(kind)
        if is_shown(spec) and spec.name not in without and (only is None or spec.name in only)
    ]
    return together(*shown)


def names_of(kind: type[Any]) -> tuple[str, ...]:
    """The names of the fields that `options_of` shows."""
    return tuple(spec.name for spec in fields(kind) if is_shown(spec))


def _option(
    name: str,
    kind: Any,
    default: Any,
    metadata: Mapping[str, Any],
    unset: bool,
    about: Mapping[str, str],
) -> Callable[[F], F]:
    flags = metadata["flags"] or ("--" + name.replace("_", "-"),)
    kind, is_path = bare_type(kind), _is_path(kind)
    text = sentence(about.get(name, str(metadata["about"])))
    if kind is bool:
        if default is False:
            return click.option(*flags, name, is_flag=True, help=text)
        return click.option(
            f"{flags[0]}/--no-{flags[0][2:]}",
            name,
            default=None if unset else default,
            show_default=not unset,
            help=f"{text}  [default: yes]" if unset else text,
        )
    if metadata.get("switch"):
        (other,) = (choice for choice in get_args(kind) if choice != default)
        return click.option(f"--{other}", name, flag_value=other, default=default, help=text)
    needed = metadata.get("needed", False)
    shown = None if unset or default in ((), MISSING) else default
    words = "" if name in about else metadata.get("unset") or (default if unset else "")
    if shown is None and words not in (None, "", ()):
        text = f"{text}  [default: {words}]"
    return click.option(
        *flags,
        name,
        type=click.Path(path_type=Path) if is_path else _type(kind, metadata),
        multiple=default == (),
        required=bool(needed),
        default=shown,
        show_default=shown is not None,
        metavar=metadata["metavar"],
        help=f"{text[:-1]}; repeatable." if default == () and "epeat" not in text else text,
    )


def _is_path(kind: Any) -> bool:
    """Whether a field holds a path: of its type, or as text."""
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    return any(part is Path or get_origin(part) is PathLike for part in get_args(kind) or (kind,))


def _type(kind: Any, limits: Mapping[str, Any]) -> Any:
    if get_origin(kind) is Literal:
        return Choice(get_args(kind))
    if get_origin(kind) in (Sequence, tuple):
        kind = get_args(kind)[0]
    if isinstance(kind, str | ForwardRef):  # more than a command line can say: its text
        return str
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
