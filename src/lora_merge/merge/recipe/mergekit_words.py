"""mergekit's words for a recipe, translated to this library's."""

from collections.abc import Mapping
from typing import Any

from lora_merge.errors import LoraMergeError

# mergekit's keys that choose layers or vocabularies, which a merge of adapters does not have.
_NOT_OURS = {
    "slices": "adapters are merged whole; use weights with filters to choose layers",
    "modules": "name the adapters themselves",
    "tokenizer_source": "an adapter has no tokenizer",
    "tokenizer": "an adapter has no tokenizer",
    "chat_template": "an adapter has no tokenizer",
}
_SHARED = {"normalize": "normalize", "lambda": "scale"}


class WordsError(LoraMergeError):
    """A recipe in mergekit's words that has no meaning for adapters."""


def translate(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A recipe's data with `models`, `model`, `parameters: {weight, normalize, lambda}` understood.

    Raises:
        WordsError: If the recipe asks for what only whole models have.
    """
    for key, remedy in _NOT_OURS.items():
        if key in data:
            raise WordsError(f"{where}: {key!r} is for whole models", remedy)
    recipe = dict(data)
    if "models" in recipe:
        if "adapters" in recipe:
            raise WordsError(f"{where}: both models and adapters", "keep one of the two")
        recipe["adapters"] = recipe.pop("models")
    if "out_dtype" in recipe:
        recipe["dtype"] = recipe.pop("out_dtype")
    parameters = recipe.get("parameters")
    parameters = dict(parameters) if isinstance(parameters, Mapping) else {}
    items = recipe.get("adapters")
    default_weight = parameters.pop("weight", None)
    parameters = _parameters(parameters)
    if isinstance(items, list | tuple):
        items = [item for item in items if not _is_base(item, recipe.get("base_model"))]
        recipe["adapters"] = [
            _item(item, default_weight, f"{where}: adapters.{index}")
            for index, item in enumerate(items)
        ]
    for theirs, ours in _SHARED.items():
        if theirs in parameters:
            value = parameters.pop(theirs)
            if theirs == "normalize" and isinstance(value, bool):
                value = "sum" if value else "none"
            recipe[ours] = value
    if isinstance(recipe.get("normalize"), bool):
        recipe["normalize"] = "sum" if recipe["normalize"] else "none"
    if isinstance(recipe.get("merge_method"), str):
        recipe["merge_method"] = recipe["merge_method"].replace("_", "-")
    if parameters or "parameters" in recipe:
        recipe["parameters"] = parameters
    return recipe


def _is_base(item: Any, base: Any) -> bool:
    """Whether an item is the base model, which mergekit's recipes often list."""
    name = item.get("model") if isinstance(item, Mapping) else item
    return base is not None and name == base


def _parameters(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """A method's parameters: mergekit's names for the same, less what says how it is computed."""
    found = dict(parameters)
    found.pop("int8_mask", None)
    if "select_topk" in found:
        found["density"] = found.pop("select_topk")
    if isinstance(found.get("rescale"), bool):
        rescale = found.pop("rescale")
        if not rescale:
            found["rescale"] = "none"
    return found


def _item(item: Any, default_weight: Any, where: str) -> Any:
    """One adapter; a bare string is its reference, a weight may stand among its parameters."""
    if isinstance(item, str):
        item = {"adapter": item}
    if not isinstance(item, Mapping):
        return item
    item = dict(item)
    if "model" in item and "adapter" not in item:
        item["adapter"] = item.pop("model")
    own = item.pop("parameters", {}) or {}
    if not isinstance(own, Mapping):
        raise WordsError(f"{where}.parameters is no mapping", "write parameters: {weight: 0.5}")
    own = _parameters(own)
    if "weight" in own:
        weight = own.pop("weight")
        item.setdefault("weight", weight)
    if own:
        item["parameters"] = own
    if default_weight is not None:
        item.setdefault("weight", default_weight)
    return item
