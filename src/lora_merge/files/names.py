"""Names that come from a file: plain names below a directory, or refused before anything opens."""

from pathlib import Path, PurePosixPath

from lora_merge.errors import SourceError

_LONGEST_PART = 255  # bytes, what file systems take
_REMEDY = "do not trust it; get it again from a source you know"


def place_below(root: Path, name: object, what: str) -> Path:
    """Where a name from a file leads.

    The Hub's cache keeps files as links to its own store of blobs; those are followed, no others.

    Args:
        root: The directory that the name is relative to.
        name: As it stands in the file: a shard, an expert's folder, anything that is opened.
        what: What names it, for the message.

    Raises:
        SourceError: If it is no plain relative name, or a link takes it out of the directory.
    """
    fault = fault_of(name)
    if fault:
        raise SourceError(f"{what}: {name!r:.100} {fault}", _REMEDY)
    path = root / str(name)
    check_link(root, path, what)
    return path


def check_link(root: Path, path: Path, what: str) -> None:
    """Refuse a path whose links lead out of its directory.

    Raises:
        SourceError: Naming where it leads.
    """
    try:
        resolved, inside = path.resolve(), root.resolve()
    except (OSError, RuntimeError) as error:  # a loop of links
        raise SourceError(f"{what}: {path} leads nowhere: {error}", "repair the link") from error
    if not any(resolved.is_relative_to(allowed) for allowed in (inside, *_hub_blobs(inside))):
        raise SourceError(
            f"{what}: {path} is a link that leads out of its directory",
            "put the file itself there, or name the directory that holds it",
        )


def fault_of(name: object) -> str | None:
    """Why something is no plain relative name of a file; None if it is one."""
    if not isinstance(name, str) or not name.strip():
        return "is no name of a file"
    plain = PurePosixPath(name)
    if plain.is_absolute() or ".." in plain.parts or not plain.parts:
        return "leads out of its directory"
    if any(ord(letter) < 32 or letter in "\\:\x7f" for letter in name):
        return "holds characters that names of files do not have"
    try:
        longest = max(len(part.encode()) for part in plain.parts)
    except UnicodeEncodeError:
        return "is no UTF-8"
    return "is too long" if longest > _LONGEST_PART else None


def _hub_blobs(root: Path) -> list[Path]:
    """The store that a revision in the Hub's cache links to: models--*/snapshots/REV -> blobs."""
    snapshots = [one for one in root.parents if one.name == "snapshots"]
    return [one.parent / "blobs" for one in snapshots[:1] if (one.parent / "refs").is_dir()]
