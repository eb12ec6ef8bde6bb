"""JSON and YAML from somewhere: read whole, and refused where plain data ends."""

import json
from collections.abc import Callable
from dataclasses import is_dataclass
from functools import cache
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar

from lora_merge.errors import LoraMergeError, SourceError
from lora_merge.files.inputs import note_input

_T = TypeVar("_T")

# Far more than any true file has; a file says how much memory and time its reader needs.
_LARGEST = {"JSON": 1 << 26, "YAML": 1 << 20}
_DEEPEST = 50
_MOST_VALUES = 2_000_000
_LONGEST_NUMBER = 1 << 63
_RIGHTS = "check the path and its rights"


def read_json(
    path: Path, what: str, *, finite: bool = True, error: type[LoraMergeError] = SourceError
) -> Any:
    """The plain data of a JSON file.

    Args:
        path: The file.
        what: Its owner, for messages.
        finite: Refuse NaN and Infinity, which Python writes though JSON has them not.
        error: The error to raise.

    Raises:
        LoraMergeError: Of the kind given, if it cannot be read or holds more than plain data.
    """
    return _read(path, what, "JSON", json.loads, finite, error)


def parse_json(
    text: str, what: str, *, finite: bool = True, error: type[LoraMergeError] = SourceError
) -> Any:
    """The plain data of JSON that stands in another file, in a header for example.

    Raises:
        LoraMergeError: Of the kind given, if it is no JSON or holds more than plain data.
    """
    return _plain(what, "JSON", json.loads, text, finite, error)


def read_cache(kind: type[_T], path: Path, *, finite: bool = True) -> _T | None:
    """What an earlier run remembered; None where nothing did, or it is not as it was written."""
    try:
        if path.stat().st_size > _LARGEST["JSON"]:
            return None
        data = parse_json(path.read_text(encoding="utf-8"), str(path), finite=finite)
        return validated(kind, data, str(path))
    except (OSError, ValueError, SourceError):
        return None


def read_yaml(path: Path, what: str, *, error: type[LoraMergeError] = SourceError) -> Any:
    """The plain data of a YAML file; anchors that are used again and again count each time.

    Raises:
        LoraMergeError: Of the kind given, if it cannot be read or holds more than plain data.
    """
    return _read(path, what, "YAML", _load_yaml, True, error)


def parse_yaml(text: str, what: str, *, error: type[LoraMergeError] = SourceError) -> Any:
    """The plain data of YAML that stands in another file.

    Raises:
        LoraMergeError: Of the kind given, if it is no YAML or holds more than plain data.
    """
    return _plain(what, "YAML", _load_yaml, text, True, error)


def _load_yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as fault:
        raise ValueError(fault) from fault


def _read(
    path: Path,
    what: str,
    kind: str,
    load: Callable[[str], Any],
    finite: bool,
    error: type[LoraMergeError],
) -> Any:
    note_input(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:  # a device says nothing of its size
            data = file.read(_LARGEST[kind] + 1) if size <= _LARGEST[kind] else b""
        if max(size, len(data)) > _LARGEST[kind]:
            raise error(
                f"{what}: {path} is {max(size, len(data))} bytes long", "is it the right file?"
            )
        text = data.decode("utf-8")
    except OSError as fault:
        raise error(f"{what}: cannot read {path}: {fault.strerror}", _RIGHTS) from fault
    except ValueError as fault:
        raise error(f"{what}: {path} is not valid {kind}: {fault}", "repair it") from fault
    return _plain(f"{what}: {path}", kind, load, text, finite, error)


def _plain(
    where: str,
    kind: str,
    load: Callable[[str], Any],
    text: str,
    finite: bool,
    error: type[LoraMergeError],
) -> Any:
    try:
        data = load(text)
    except ValueError as fault:  # also numbers of 5,000 digits
        raise error(f"{where} is not valid {kind}: {fault}", "repair it") from fault
    except RecursionError as fault:
        raise error(f"{where} is nested too deeply", "repair it") from fault
    reason = _not_plain(data, finite)
    if reason:
        raise error(f"{where} {reason}", "repair it")
    return data


def validated(
    kind: type[_T],
    data: Any,
    what: str,
    remedy: str = "get it again",
    *,
    error: type[LoraMergeError] = SourceError,
) -> _T:
    """Plain data as what a pydantic model (or any type that pydantic knows) says it is.

    Raises:
        LoraMergeError: Of the kind given, naming the first field that is not.
    """
    from pydantic import ValidationError

    try:
        found: _T = _checker(kind).validate_python(data)  # type: ignore[arg-type]
    except ValidationError as faults:
        first = faults.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "its top"
        raise error(f"{what}: {place:.100}: {first['msg'].lower()}", remedy) from faults
    where = _not_finite(found)
    if where is not None and _not_finite(data) is None:  # pydantic takes "nan" for a number
        raise error(f"{what}: {where:.100}: a text stands for a number that is not finite", remedy)
    return found


def _not_finite(tree: Any) -> str | None:
    """Where in dataclasses, mappings and sequences a float is not finite."""
    waiting: list[tuple[str, Any]] = [("", tree)]
    while waiting:
        place, one = waiting.pop()
        if isinstance(one, float):
            if not isfinite(one):
                return place.removeprefix(".") or "its top"
        elif is_dataclass(one):
            waiting += ((f"{place}.{name}", value) for name, value in vars(one).items())
        elif isinstance(one, dict):
            waiting += ((f"{place}.{name}", value) for name, value in one.items())
        elif isinstance(one, list | tuple):
            waiting += ((f"{place}.{number}", value) for number, value in enumerate(one))
    return None


@cache
def _checker(kind: Any) -> Any:
    """A type's checks, which take longer to make than to use."""
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _not_plain(tree: Any, finite: bool) -> str | None:
    """Why a document is more than plain data of a sensible size; None if it is not."""
    waiting, seen = [(tree, 0, "")], 0
    while waiting:
        one, depth, where = waiting.pop()
        seen += 1
        if depth > _DEEPEST:
            return f"is nested more than {_DEEPEST} deep"
        if seen > _MOST_VALUES:
            return f"holds more than {_MOST_VALUES:,} values"
        if isinstance(one, dict):
            for key in one:
                reason = "is no text" if not isinstance(key, str) else _bad_value(key, finite)
                if reason:
                    return f"has a key under {where or 'its top'} that {reason}"
            waiting += [(value, depth + 1, f"{key:.60}") for key, value in one.items()]
        elif isinstance(one, list):
            waiting += [(value, depth + 1, where) for value in one]
        else:
            reason = _bad_value(one, finite)
            if reason:
                return f"has a value of {where or 'its top'} that {reason}"
    return None


def _bad_value(value: Any, finite: bool) -> str | None:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return "is no Unicode text"
        return None
    if isinstance(value, float):
        return "is not finite" if finite and not isfinite(value) else None
    if isinstance(value, int):
        return "is beyond 64 bits" if not -_LONGEST_NUMBER <= value < _LONGEST_NUMBER else None
    return None if value is None else f"is a {type(value).__name__}"
