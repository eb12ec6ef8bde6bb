"""Output directories and files that appear whole or not at all."""

import contextlib
import ctypes
import errno
import hashlib
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from lora_merge.errors import OutputError
from lora_merge.files.stamp import (
    begin_stamp,
    discard_begun,
    finish_stamp,
    foreign_entry,
    is_unfinished,
    remove_listed,
)
from lora_merge.files.targets import check_file, check_target
from lora_merge.files.tensor_file import close_handles

try:
    import fcntl
except ImportError:  # Windows: no locks, so nothing is swept and no second run is seen
    fcntl = None  # type: ignore[assignment]

_LOG = logging.getLogger(__name__)
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_LONGEST_STEM = 200  # bytes; file systems take names of 255
_WAIT = 2.0  # seconds for another run beside this one to make or find its temporary directory


@contextlib.contextmanager
def atomic_directory(
    target: Path, *, force: bool = False, inputs: Sequence[Path] = (), needed: int = 0
) -> Iterator[Path]:
    """A fresh directory that takes the target's name when the block ends without an error.

    The one way to write a directory. The target is checked before the block and once more after
    it. The files are flushed to disk, and listed in the directory's stamp. A target that is
    replaced is exchanged for the new directory in one step where the system can (Linux), and
    deleted afterwards, entry by entry of its stamp; on an error or a kill it is still what it was.
    What runs that were killed left beside the target is deleted first.

    Args:
        target: The directory to make.
        force: Replace a directory of which lora-merge wrote every entry.
        inputs: Files and directories that are read, beside those noted.
        needed: Bytes that will be written.

    Raises:
        OutputError: If the target cannot or must not be written, or another run is writing it;
            nothing is left behind, and nothing that was there has changed.
    """
    check_target(target, force=force, inputs=inputs, needed=needed)
    target = target.resolve()
    try:
        with _parents_of(target), _staging(target) as staging:
            yield staging
            staging.chmod(0o777 & ~_umask())
            finish_stamp(staging)
            for path in staging.rglob("*"):
                if path.is_file():
                    _flush(path)
            check_target(target, force=force, inputs=inputs)
            _put_in_place(staging, target)
            _flush(target.parent)
            _LOG.info("wrote %s", target)
    except OSError as error:
        reason = error.strerror or error
        remedy = "check its rights, or choose another -o"
        raise OutputError(f"cannot write {target}: {reason}", remedy) from error


@contextlib.contextmanager
def _parents_of(target: Path) -> Iterator[None]:
    """Directories above a target that are missing: made, and removed again after an error."""
    missing = [path for path in target.parents if not path.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()  # refuses one that holds anything
        raise


@contextlib.contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """A locked temporary directory beside a target, removed at the end if it is still there."""
    with _alone_in(target.parent):
        _sweep(target)
        name = tempfile.mkdtemp(prefix=f".{_stem(target)}.", suffix=".tmp", dir=target.parent)
        staging = Path(name)
        lock = None
        try:
            lock = lock_directory(staging)
            begin_stamp(staging)
        except BaseException:
            discard_begun(staging)
            raise
    try:
        yield staging
    finally:
        close_handles()  # deleting needs some
        unfinished = staging.exists() and is_unfinished(staging)
        if staging.exists() and not unfinished:
            _put_away(staging, target)
        if lock is not None:
            os.close(lock)
        if unfinished:
            shutil.rmtree(staging, ignore_errors=True)


def _stem(target: Path) -> str:
    """What the names of a target's temporary directories have of its own, which may be long."""
    name = os.fsencode(target.name)
    return target.name if len(name) <= _LONGEST_STEM else hashlib.sha256(name).hexdigest()


def _sweep(target: Path) -> None:
    """Delete what killed runs left beside a target.

    Raises:
        OutputError: If a run that lives is writing it.
    """
    ours = re.compile(rf"\.{re.escape(_stem(target))}\.\w{{8}}\.tmp")
    for left in sorted(target.parent.glob(".*.tmp")):
        if not ours.fullmatch(left.name) or left.is_symlink() or not left.is_dir():
            continue
        unfinished = is_unfinished(left)
        if not unfinished and foreign_entry(left):
            continue
        try:
            lock = lock_directory(left)
        except BlockingIOError as error:
            raise OutputError(
                f"another run is writing {target}", "wait until it has ended, or choose another -o"
            ) from error
        if lock is None:
            continue
        if unfinished:
            shutil.rmtree(left, ignore_errors=True)
        else:
            remove_listed(left)
        os.close(lock)


def lock_directory(folder: Path) -> int | None:
    """Lock a directory until its descriptor is closed or the process ends, however it ends.

    Returns:
        The descriptor; None where the system has no such locks.

    Raises:
        BlockingIOError: If another run has the lock.
    """
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise BlockingIOError(error.errno, error.strerror) from error
        return None
    return descriptor


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Let no other run look for temporary directories while this one makes its own."""
    lock, end = None, time.monotonic() + _WAIT
    while time.monotonic() < end:
        try:
            lock = lock_directory(folder)
            break
        except BlockingIOError:
            time.sleep(0.01)
        except OSError:  # a directory that can be written but not read
            break
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


def _put_in_place(staging: Path, target: Path) -> None:
    """Give the new directory its name; an old one, which has been checked, is exchanged for it.

    What was put into the old one since then is seen afterwards, when nobody finds it by its name
    any more: then it gets its name back.
    """
    if not target.exists() or not any(target.iterdir()):
        staging.rename(target)  # POSIX replaces an empty directory, and refuses anything else
        return
    _exchange(staging, target)
    reason = foreign_entry(staging)
    if reason:
        _exchange(staging, target)
        begin_stamp(staging)
        raise OutputError(f"{target} is not replaced: {reason}", "choose another -o")


def _exchange(first: Path, second: Path) -> None:
    """Swap two directories, atomically where the system can."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
        paths = os.fsencode(first), os.fsencode(second)
        if int(rename(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE)) == 0:
            return
    except (OSError, AttributeError):
        pass
    aside = first.with_suffix(".old")
    second.rename(aside)
    first.rename(second)
    aside.rename(first)


def _put_away(old: Path, target: Path) -> None:
    """Delete what was replaced, or was finished in vain; what is not ours gets a name instead."""
    if not remove_listed(old):
        number = next(n for n in range(1, 1 << 20) if not _kept(target, n).exists())
        old.rename(_kept(target, number))


def _kept(target: Path, number: int) -> Path:
    return target.with_name(f"{target.name}.kept-{number}")


@contextlib.contextmanager
def atomic_file(
    target: Path, remedy: str = "choose another file", *, mark: bytes = b""
) -> Iterator[Path]:
    """A path to write to that takes the target's name when the block ends without an error.

    It lies in a temporary directory beside the target, of the kind that `atomic_directory` makes.
    What is no plain file (a pipe, /dev/stdout) is written to as it is.

    Args:
        target: The file to make.
        remedy: What the user can do where it cannot be made.
        mark: Bytes at the start of every file of this kind; see `check_file`.

    Raises:
        OutputError: If the system refuses, another run is writing it, or the file that is there
            must not be replaced; it is still what it was.
    """
    try:
        if target.exists() and not target.is_file():
            yield target
            return
        check_file(target, mark)
        target = target.resolve()
        with _staging(target) as staging:
            path = staging / target.name
            yield path
            path.chmod(0o666 & ~_umask())
            _flush(path)
            check_file(target, mark)
            path.replace(target)
            _flush(target.parent)
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(f"cannot write {target}: {reason}", remedy) from error


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
