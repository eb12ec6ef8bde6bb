"""What may be written where: every output is checked here, before any work and once more after."""

import errno
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from lora_merge.errors import OutputError
from lora_merge.files.inputs import first_within, is_any_of, is_within, noted_inputs
from lora_merge.files.stamp import foreign_entry

_HEAD = 1 << 12  # bytes at a file's start or end in which its mark must stand
# Stands in every single file that we write and that can hold a remark.
MARK = "made by lora-merge"


def check_target(
    target: Path, *, force: bool, inputs: Iterable[Path] = (), needed: int = 0
) -> None:
    """Refuse a target directory.

    Args:
        target: The directory that is to be created.
        force: Replace what is there, if lora-merge wrote every entry of it.
        inputs: Files and directories that are read, beside those noted: the target may neither
            hold one nor, of a directory, lie in it.
        needed: Bytes that will be written.

    Raises:
        OutputError: If the target cannot or must not be written.
    """
    _check_name(target)
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise OutputError(f"{target} exists and is no directory", "choose another -o")
    said, target = target, target.resolve()  # of "missing/../there", what is there
    if is_within(Path.cwd(), target):
        raise OutputError(
            f"{said} is the working directory, or above it", "choose another -o: a new directory"
        )
    if target.is_dir() and os.path.ismount(target):
        raise OutputError(f"{said} is a mount point", "choose a directory inside it as -o")
    _keep_apart(target, {*inputs, *noted_inputs()})
    if target.is_dir() and any(target.iterdir()):
        if not force:
            raise OutputError(
                f"{said} exists and is not empty", "choose another -o, or --force to replace it"
            )
        reason = foreign_entry(target)
        if reason:
            raise OutputError(
                f"{said} is not replaced: {reason}",
                "choose another -o, or move that directory away yourself",
            )
    parent = check_parent(target)
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OutputError(
            f"no space for the result: {needed / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free "
            f"on {parent}",
            "free space or choose another -o",
        )


def _check_name(path: Path) -> None:
    """Refuse a name that the system does not take, or that means a home to whoever reads it."""
    if path.parts[:1] and path.parts[0].startswith("~"):
        raise OutputError(
            f"{path}: nothing is written to a directory called {path.parts[0]}",
            "write out the path of the home",
        )
    try:
        path.lstat()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise OutputError(f"{path}: {error.strerror}") from error


def _keep_apart(target: Path, inputs: set[Path]) -> None:
    held = first_within(inputs, target)
    if held is not None:
        raise OutputError(f"{target} holds an input ({held})", "choose another -o")
    for path in sorted(inputs):
        if path.is_dir() and is_within(target, path):
            raise OutputError(f"{target} lies inside an input ({path})", "choose another -o")


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


def check_file(path: Path, mark: bytes = b"", *, inputs: Iterable[Path] = ()) -> None:
    """Refuse a file that cannot or must not be written.

    Args:
        path: The file.
        mark: Bytes that stand near the start (or the end: PDF) of every file of this kind that we
            write; a file that is there and has them not is somebody else's.
        inputs: What is read, beside the inputs that were noted.

    Raises:
        OutputError: If its directory does not exist or cannot be written, a directory has its
            name, it is an input, or it is not ours.
    """
    remedy = "choose another file"
    _check_name(path)
    if check_parent(path, remedy) != path.resolve().parent:
        raise OutputError(f"{path.parent} does not exist", remedy)
    if path.is_dir():
        raise OutputError(f"{path} is a directory", remedy)
    if not path.is_file():
        return
    if is_any_of(path, {*inputs, *noted_inputs()}):
        raise OutputError(f"{path} is an input", remedy)
    with path.open("rb") as file:
        head = file.read(_HEAD)
        file.seek(-min(_HEAD, path.stat().st_size), os.SEEK_END)
        tail = file.read()
    if head and mark not in head and mark not in tail:
        raise OutputError(
            f"{path} exists, and lora-merge did not write it", f"{remedy}, or move it away"
        )
