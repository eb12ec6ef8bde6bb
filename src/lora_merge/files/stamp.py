"""The stamp: a file in every directory we make that lists what else we put there.

It says what `--force` may replace: a directory in which every entry is listed and unchanged.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from lora_merge._version import __version__
from lora_merge.files.names import fault_of

STAMP = ".lora_merge_files.json"
_PART = f"{STAMP}.part"
_LARGEST = 1 << 26  # bytes of a stamp that is read
# Larger files are told apart by their size and samples: an edit by hand or another training changes
# them, and reading a whole model again would double the time of writing it.
_WHOLE, _SAMPLE, _SAMPLES = 1 << 24, 1 << 18, 64


def begin_stamp(folder: Path) -> None:
    """Mark a directory that is being written, so that what a kill leaves is known as ours."""
    _write(folder, {"unfinished": True})


def discard_begun(folder: Path) -> None:
    """Delete a directory that could not be marked; opens nothing, as no more files may be open."""
    for name in (STAMP, _PART):
        (folder / name).unlink(missing_ok=True)
    folder.rmdir()


def finish_stamp(folder: Path) -> None:
    """List everything that a directory holds."""
    files = {name: _fingerprint(folder / name) for name in sorted(_files(folder)) if name != STAMP}
    _write(folder, {"files": files})


def list_more(folder: Path, changed: Iterable[str], also: Iterable[str] = ()) -> None:
    """List files that were added to a directory, or changed, since it was finished.

    Args:
        folder: The directory.
        changed: What is listed anew.
        also: What is listed if it is not yet.
    """
    listed = _read(folder).get("files")
    known = dict(listed) if isinstance(listed, dict) else {}
    names = {*changed, *(name for name in also if name not in known)}
    _write(folder, {"files": {**known, **{name: _fingerprint(folder / name) for name in names}}})


def is_unfinished(folder: Path) -> bool:
    """Whether a directory was being written by us; one that was only made has nothing to lose."""
    if _read(folder).get("unfinished") is True:
        return True
    return all(path.name == _PART for path in _entries(folder))


def foreign_entry(folder: Path) -> str | None:
    """Why a directory is not ours alone; None if we wrote every entry and none has changed."""
    listed = _read(folder).get("files")
    if not isinstance(listed, dict):
        return f"it has no {STAMP}, the list of what lora-merge wrote"
    kept = {STAMP, *listed}
    folders = {str(parent) for name in kept for parent in Path(name).parents}
    found: list[str] = []
    for path in _entries(folder):
        name = path.relative_to(folder).as_posix()
        if path.name == ".git":
            return f"it holds a Git repository ({name})"
        if path.is_dir() and not path.is_symlink():
            known = name in folders
        else:
            known = name in kept and path.is_file() and not path.is_symlink()
        if not known:
            return f"lora-merge did not write {name}"
        if name in listed:
            found.append(name)
    changed = (name for name in found if _fingerprint(folder / name) != listed[name])
    name = next(changed, "")
    return f"{name} was changed after lora-merge wrote it" if name else None


def remove_listed(folder: Path) -> bool:
    """Delete what a stamp lists, and directories that are empty then; nothing else.

    Returns:
        Whether the directory is gone.
    """
    listed = _read(folder).get("files")
    for name in (*(listed if isinstance(listed, dict) else ()), STAMP):
        with contextlib.suppress(OSError):
            (folder / name).unlink()
    folders = [path for path in _entries(folder) if path.is_dir() and not path.is_symlink()]
    for path in (*reversed(folders), folder):
        with contextlib.suppress(OSError):
            path.rmdir()
    return not folder.exists()


def _write(folder: Path, what: dict[str, object]) -> None:
    text = json.dumps({"lora_merge": __version__, **what}, indent=1, sort_keys=True) + "\n"
    part = folder / _PART
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(folder / STAMP)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def _read(folder: Path) -> dict[str, object]:
    """What a stamp says; nothing where there is none, or it cannot be read."""
    path = folder / STAMP
    try:
        if path.is_symlink() or path.stat().st_size > _LARGEST:
            return {}
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(data, dict) or "lora_merge" not in data:
        return {}
    files = data.get("files", {})
    plain = isinstance(files, dict) and not any(map(fault_of, files))
    return data if plain else {}


def _files(folder: Path) -> Iterator[str]:
    for path in _entries(folder):
        if not path.is_dir() or path.is_symlink():
            yield path.relative_to(folder).as_posix()


def _entries(folder: Path) -> Iterator[Path]:
    """Everything below a directory, above before below; links are not followed."""
    waiting = [folder]
    while waiting:
        for entry in sorted(os.scandir(waiting.pop()), key=lambda entry: entry.name):
            yield Path(entry.path)
            if entry.is_dir(follow_symlinks=False):
                waiting.append(Path(entry.path))


def _fingerprint(path: Path) -> list[object]:
    """[size, SHA-256 of the content], of samples of it where it is large."""
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if size <= _WHOLE:
            digest.update(file.read())
        else:
            for index in range(_SAMPLES):
                file.seek((size - _SAMPLE) * index // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE))
    return [size, digest.hexdigest()]
