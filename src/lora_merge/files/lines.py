"""Lines of a text file, a pipe or a device: read once, and no more than any true file has."""

import hashlib
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from lora_merge.errors import LoraMergeError
from lora_merge.files.inputs import note_input

_LARGEST = 1 << 30  # bytes of a file
_LONGEST = 1 << 26  # bytes of a line: a device that never ends has none
_PIECE = 1 << 22
_REMEDY = "give a UTF-8 JSON-lines file"


@dataclass(frozen=True)
class Lines:
    """What was read.

    Attributes:
        path: From where.
        texts: Every line, less its end. JSON strings may hold what `str.splitlines` breaks at.
        sha256: Of the bytes.
    """

    path: Path
    texts: tuple[str, ...]
    sha256: str


def read_lines(path: Path, *, error: type[LoraMergeError]) -> Lines:
    """Read lines of UTF-8; of a pipe there is no second time.

    Args:
        path: Anything that can be opened.
        error: The error to raise.

    Raises:
        LoraMergeError: Of the kind given, if it cannot be read, or has more than 1 GiB, or a line
            of more than 64 MiB.
    """
    note_input(path)
    data = bytearray()
    try:
        with path.open("rb") as file:
            for piece in _pieces(path, file, error):
                data += piece
        texts = data.decode("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as fault:
        reason = fault.strerror if isinstance(fault, OSError) else fault
        raise error(f"{path} cannot be read: {reason}", _REMEDY) from fault
    return Lines(path, tuple(texts), hashlib.sha256(data).hexdigest())


def _pieces(path: Path, file: BinaryIO, error: type[LoraMergeError]) -> Iterator[bytes]:
    about = path.stat()
    total, line = about.st_size if stat.S_ISREG(about.st_mode) else 0, 0
    if total > _LARGEST:
        raise error(f"{path} is {total} bytes long, more than {_LARGEST}", "split it")
    total = 0
    while piece := file.read(_PIECE):
        total += len(piece)
        end = piece.rfind(b"\n")
        line = len(piece) - end - 1 if end >= 0 else line + len(piece)
        if total > _LARGEST:
            raise error(f"{path} does not end within {_LARGEST} bytes", _REMEDY)
        if line > _LONGEST:
            raise error(f"{path} has a line of more than {_LONGEST} bytes", _REMEDY)
        yield piece
