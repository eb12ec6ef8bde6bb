"""JSON files of shards: written whole, and read as what their writer put there."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from lora_merge.errors import OutputError
from lora_merge.files.documents import read_json, validated

_T = TypeVar("_T")


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a file that appears whole."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    part.replace(path)


def read_record(kind: type[_T], path: Path, remedy: str) -> _T:
    """What a file holds, as a dataclass.

    Raises:
        OutputError: If it cannot be read or is no such thing.
    """
    what = f"{path} is damaged"
    try:  # thresholds may be infinite
        data = read_json(path, what, finite=False, error=OutputError)
    except OutputError as error:
        raise OutputError(error.message, remedy) from error
    return validated(kind, data, what, remedy, error=OutputError)
