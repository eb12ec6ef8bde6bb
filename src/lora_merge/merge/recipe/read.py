"""Read a recipe: a merge as a YAML file that gives the same bytes whenever it is run."""

import os
from collections.abc import Mapping
from dataclasses import fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from lora_merge.adapters.access.coerce import base_for
from lora_merge.adapters.adapter import Adapter, open_adapter
from lora_merge.adapters.base_weights import BaseModel
from lora_merge.adapters.config import AdapterConfig
from lora_merge.adapters.identity.expert_choice import all_in_layout
from lora_merge.adapters.identity.rename import rename_all
from lora_merge.adapters.references import expand, pin, resolve
from lora_merge.errors import MethodError
from lora_merge.files.documents import read_yaml
from lora_merge.merge.recipe.mergekit_words import translate
from lora_merge.merge.recipe.paths import located
from lora_merge.merge.recipe.recipe import AdapterItem, Recipe, RecipeError
from lora_merge.ranks.rule import parse_rule

_UNKNOWN_KEY = "unexpected_keyword_argument"  # pydantic's name for it


def read_recipe(path: Path) -> Recipe:
    """Read a recipe file.

    Raises:
        RecipeError: If it is no valid recipe; an unknown key gets the nearest known one.
    """
    data = read_yaml(path, "the recipe", error=RecipeError)
    if not isinstance(data, dict):
        raise RecipeError(f"{path} holds no mapping", "a recipe has keys like merge_method")
    return parse_recipe(data, str(path))


def parse_recipe(data: dict[str, Any], where: str) -> Recipe:
    """Validate a recipe given as plain data."""
    # Imported here: a tenth of a second that a merge without a recipe file need not pay.
    from pydantic import TypeAdapter, ValidationError

    # What a result was made of stands in its recipe for people; it decides nothing.
    data = {key: value for key, value in data.items() if key != "units"}
    try:
        recipe = TypeAdapter(Recipe).validate_python(translate(data, where))
    except ValidationError as error:
        # A misspelt key also shows as a missing one; the misspelling is the better message.
        faults = sorted(error.errors(), key=lambda fault: fault["type"] != _UNKNOWN_KEY)
        raise RecipeError(*_explain(faults[0], where)) from error
    if isinstance(recipe.rank, str):
        try:
            parse_rule(recipe.rank)
        except MethodError as error:
            raise RecipeError(f"{where}: rank: {error.message}", error.remedy) from error
    if not recipe.adapters:
        raise RecipeError(f"{where}: adapters is empty", "name at least one adapter")
    return recipe


def expanded(recipe: Recipe) -> Recipe:
    """The recipe with one item per adapter: globs may stand for many.

    Raises:
        SourceError: If a pattern matches nothing.
    """
    items = [
        replace(item, adapter=ref) for item in recipe.adapters for ref in expand([item.adapter])
    ]
    return replace(recipe, adapters=tuple(items))


def as_recipe(recipe: Recipe | Mapping[str, Any] | str | os.PathLike[str]) -> Recipe:
    """A recipe from its file or from plain data, globs in it expanded; a recipe as it is.

    Raises:
        RecipeError: If it is no valid recipe.
    """
    if isinstance(recipe, str | os.PathLike):
        return expanded(located(read_recipe(Path(recipe)), Path(recipe)))
    if isinstance(recipe, Recipe):
        return recipe
    return expanded(parse_recipe(dict(recipe), "the recipe"))


def open_recipe(recipe: Recipe, *, allow_pickle: bool = False) -> list[Adapter]:
    """Open a recipe's adapters at their pinned revisions, one per item.

    Raises:
        SourceError: If one is not found.
        AdapterError: If one is no LoRA adapter.
        RecipeError: If one is not that from which the recipe was made.
    """
    base = None if recipe.base is None else base_for(recipe.base, recipe.rename)
    opened = [_open(item, allow_pickle, base) for item in recipe.adapters]
    return all_in_layout(rename_all(opened, recipe.rename), recipe.experts, base)


def _open(item: AdapterItem, allow_pickle: bool, base: BaseModel | None) -> Adapter:
    fallback = None
    if item.alpha is not None:
        fallback = AdapterConfig(r=None, lora_alpha=item.alpha, use_rslora=item.rslora)
    ref = pin(item.adapter, item.revision) if item.revision else item.adapter
    # A pinned reference keeps the name the user knows it by.
    source = replace(resolve(ref, allow_pickle=allow_pickle), ref=item.adapter)
    if item.sha256 and source.digest != item.sha256:
        raise RecipeError(
            f"{item.adapter}: its weights are not those the recipe was made from",
            "get the original file, or remove sha256 from the recipe",
        )
    return open_adapter(source, fallback=fallback, base=base)


def _explain(fault: Any, where: str) -> tuple[str, str]:
    """One line for a pydantic fault, and a remedy."""
    place = ".".join(str(part) for part in fault["loc"]) or "recipe"
    if fault["type"] == _UNKNOWN_KEY:
        model = AdapterItem if fault["loc"][0] == "adapters" else Recipe
        known = [spec.name for spec in fields(model)]
        near = get_close_matches(str(fault["loc"][-1]), known, n=1)
        return (
            f"{where}: unknown key {place!r}",
            f"did you mean {near[0]!r}?" if near else f"keys are: {', '.join(known)}",
        )
    return f"{where}: {place}: {fault['msg'].lower()}", "correct the recipe"


def inputs_of(recipe: Recipe) -> list[Path]:
    """The files and directories that a recipe names, as far as they are on this disk."""
    named = [item.adapter for item in recipe.adapters]
    named += [recipe.statistics] if recipe.statistics else []
    return [Path(path) for path in named if Path(path).exists()]
