"""What a run has read so far, so that no output replaces it, however it was named."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

# Of the running command; worker threads add to it as well, so it is no context variable.
_noted: set[Path] | None = None


@contextmanager
def noting_inputs() -> Iterator[None]:
    """Remember what is read until the block ends; one command is one such block."""
    global _noted
    before, _noted = _noted, set()
    try:
        yield
    finally:
        _noted = before


def note_input(path: str | Path) -> None:
    """Say that a file or directory is read; every reader of the product does."""
    if _noted is not None:
        _noted.add(Path(path).absolute())


def noted_inputs() -> frozenset[Path]:
    """What has been read since the command began; empty outside of one."""
    return frozenset(_noted or ())


def is_within(path: Path, folder: Path) -> bool:
    """Whether a path is a directory or lies below it, links, mounts and letter case seen through.

    Args:
        path: It, or what is above it, may be missing.
        folder: A directory; what does not exist holds nothing.
    """
    try:
        wanted = folder.stat()
    except OSError:
        return False
    resolved = path.resolve()
    return any(_is_same(one, wanted) for one in (resolved, *resolved.parents))


def first_within(paths: Iterable[Path], folder: Path) -> Path | None:
    """The first of some paths that lies in a directory."""
    return next((path for path in sorted(paths) if is_within(path, folder)), None)


def is_any_of(path: Path, others: Iterable[Path]) -> bool:
    """Whether a file is one of others, by whatever name or link."""
    try:
        wanted = path.stat()
    except OSError:
        return False
    return any(_is_same(other, wanted) for other in others)


def _is_same(path: Path, wanted: os.stat_result) -> bool:
    try:
        return os.path.samestat(path.stat(), wanted)
    except OSError:
        return False
