"""Paths in a recipe's file: they are meant from where the file lies."""

import os
from collections.abc import Sequence
from dataclasses import replace
from glob import has_magic
from pathlib import Path

from lora_merge.merge.recipe.recipe import Recipe


def located(recipe: Recipe, file: Path) -> Recipe:
    """The recipe of a file with its relative paths as they are from the current directory.

    A path is looked for in the file's directory. A recipe that a merge wrote has its paths from
    where the merge was run, which is mostly above: there the directories above are looked at, too,
    and the hashes in the recipe say whether it is the right one. What is nowhere there is left as
    it is: a path from the current directory, or a name on the Hub.
    """
    folder = file.resolve().parent
    written = any(item.sha256 for item in recipe.adapters)
    places = [folder, *folder.parents] if written else [folder]
    items = [replace(one, adapter=_found(one.adapter, places)) for one in recipe.adapters]
    base, statistics = (
        name if name is None else _found(name, places) for name in (recipe.base, recipe.statistics)
    )
    return replace(recipe, adapters=tuple(items), base=base, statistics=statistics)


def _found(name: str, places: Sequence[Path]) -> str:
    if Path(name).is_absolute() or "://" in name or name.startswith("~"):
        return name
    # A member or a choice of a library, or a folder of a repository, goes by what it lies in.
    path, mark, rest = name, "", ""
    if not has_magic(name) or "=" in name:
        end = min((i for i in (name.find(":"), name.find("[")) if i > 0), default=len(name))
        path, mark, rest = name[:end], name[end : end + 1], name[end + 1 :]
    for place in places:
        if not (place / path).exists() and not (has_magic(path) and any(place.glob(path))):
            continue
        if place == Path.cwd():
            return name
        return os.path.relpath(place / path) + mark + rest
    return name
