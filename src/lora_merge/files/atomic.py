"""Output directories and files that appear whole or not at all."""

import contextlib
import ctypes
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from lora_merge.errors import OutputError

# One of these in a directory says that it is something this library (or PEFT) wrote.
_MARKERS = ("adapter_config.json", "lora_merge.yaml", "lora_merge_mixture.json", "config.json")
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def check_target(
    target: Path, *, force: bool, inputs: Sequence[Path] = (), needed: int = 0
) -> None:
    """Refuse a target directory before any work is done.

    Args:
        target: The directory that is to be created.
        force: Replace an existing adapter directory.
        inputs: Files that are read; the target may not contain one of them.
        needed: Bytes that will be written.

    Raises:
        OutputError: If the target cannot or must not be written.
    """
    resolved = target.resolve()
    for path in inputs:
        if path.resolve().is_relative_to(resolved):
            raise OutputError(f"{target} holds an input ({path})", "choose another -o")
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise OutputError(f"{target} exists and is no directory", "choose another -o")
    if target.is_dir() and any(target.iterdir()):
        if not force:
            raise OutputError(
                f"{target} exists and is not empty", "choose another -o, or --force to replace it"
            )
        if not any((target / marker).is_file() for marker in _MARKERS):
            raise OutputError(
                f"{target} is not empty and holds no adapter, so it is not replaced",
                "choose another -o, or empty it yourself",
            )
    parent = check_parent(resolved)
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OutputError(
            f"no space for the result: {needed / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free "
            f"on {parent}",
            "free space or choose another -o",
        )


def check_parent(path: Path, remedy: str = "choose another -o") -> Path:
    """Refuse a path whose directory cannot be written, before any work is done.

    Args:
        path: What is to be created; directories above it may be missing.
        remedy: What the user can do about it.

    Returns:
        The nearest directory above it that exists.

    Raises:
        OutputError: If nothing can be created there.
    """
    parent = path.resolve().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise OutputError(f"{parent} is no directory", remedy)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{parent} is not writable", remedy)
    return parent


def check_file(path: Path) -> None:
    """Refuse a file that cannot be written, before any work is done for it.

    Raises:
        OutputError: If its directory does not exist or cannot be written, or a directory has its
            name.
    """
    if check_parent(path, "choose another file") != path.resolve().parent:
        raise OutputError(f"{path.parent} does not exist", "choose another file")
    if path.is_dir():
        raise OutputError(f"{path} is a directory", "choose another file")


@contextlib.contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """A fresh directory that takes the target's name when the block ends without an error.

    The files are flushed to disk first. An existing target is exchanged for the new directory in
    one step where the system can (Linux), and deleted afterwards; on an error or a kill it is still
    what it was. What runs that were killed left beside the target is deleted first.
    """
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target)
    try:
        staging = Path(
            tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
        )
    except OSError as error:
        raise OutputError(
            f"cannot write beside {target}: {error.strerror}", "choose another -o"
        ) from error
    lock = None
    try:
        lock = _lock(staging)
        yield staging
        staging.chmod(0o777 & ~_umask())
        for path in staging.rglob("*"):
            if path.is_file():
                _flush(path)
        _put_in_place(staging, target)
        _flush(target.parent)
    except OSError as error:
        raise OutputError(
            f"cannot write {target}: {error}", "free space or choose another -o"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _sweep(target: Path) -> None:
    """Delete directories that nobody is writing any more."""
    for left in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
        with contextlib.suppress(OSError):
            lock = _lock(left)
            if lock is not None:
                shutil.rmtree(left, ignore_errors=True)
                os.close(lock)


def _lock(folder: Path) -> int | None:
    """Lock a directory until its descriptor is closed or the process ends, however it ends.

    Returns:
        The descriptor; None if another process has the lock, or the system has no such locks.
    """
    try:
        import fcntl
    except ImportError:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


@contextlib.contextmanager
def atomic_file(target: Path, remedy: str = "choose another file") -> Iterator[Path]:
    """A path to write to that takes the target's name when the block ends without an error.

    What is no plain file (a pipe, /dev/stdout) is written to as it is.

    Raises:
        OutputError: If the system refuses; a file that was there is still what it was.
    """
    staging = None
    try:
        if target.exists() and not target.is_file():
            yield target
            return
        target = target.resolve()
        descriptor, name = tempfile.mkstemp(
            prefix=f".{target.stem}.", suffix=target.suffix, dir=target.parent
        )
        os.close(descriptor)
        staging = Path(name)
        yield staging
        staging.chmod(0o666 & ~_umask())
        _flush(staging)
        staging.replace(target)
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror or error}", remedy) from error
    finally:
        if staging is not None:
            staging.unlink(missing_ok=True)


def _put_in_place(staging: Path, target: Path) -> None:
    if not target.exists() or not any(target.iterdir()):
        staging.rename(target)  # POSIX replaces an empty directory
    elif not _exchange(staging, target):  # if it did, the caller deletes the old one
        aside = staging.with_suffix(".old")
        target.rename(aside)
        staging.rename(target)
        shutil.rmtree(aside, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two directories atomically; False where the system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    paths = os.fsencode(first), os.fsencode(second)
    return int(rename(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE)) == 0


def _flush(path: Path) -> None:
    """Wait until the disk has what was written to a file, or the names in a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
