"""The recipe: a merge as a YAML file that gives the same bytes whenever it is run."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml

from lora_merge.adapters.adapter import Adapter, open_adapter
from lora_merge.adapters.config import AdapterConfig
from lora_merge.adapters.identity.rename import rename_all
from lora_merge.adapters.references import expand, pin, resolve, sha256
from lora_merge.adapters.writer import RankLayout
from lora_merge.errors import LoraMergeError, MethodError
from lora_merge.files.inputs import note_input
from lora_merge.merge.calibrate import RestoreNorm
from lora_merge.merge.extras import ExtrasPolicy
from lora_merge.merge.methods.method import Normalize, Space
from lora_merge.merge.methods.spaces import Anchor
from lora_merge.merge.pipeline import Semantics
from lora_merge.merge.plan import MergePlan, plan_merge
from lora_merge.merge.recipe.by_module import ByModule
from lora_merge.merge.recipe.mergekit_words import translate
from lora_merge.ranks.rule import parse_rule

_SEMANTICS = tuple(spec.name for spec in fields(Semantics))
RECIPE_NAME = "lora_merge.yaml"
_UNKNOWN_KEY = "unexpected_keyword_argument"  # pydantic's name for it


class RecipeError(LoraMergeError):
    """A recipe that cannot be read or does not fit its inputs."""


@dataclass(frozen=True)
class AdapterItem:
    """One adapter of a recipe.

    Attributes:
        adapter: Directory, .safetensors file or Hub reference.
        weight: Factor on the adapter's delta; 0 is the same as absent. A list is a gradient over
            the layers; a list of {filter, value} decides by module name, the first match wins.
        revision: Commit on the Hub that was used.
        sha256: Hash of the weights file; checked when given.
        alpha: lora_alpha of a file without a config.
        rslora: That file's scaling is alpha / sqrt(r).
        parameters: Parameters of the method for this adapter alone (density, ...), written as
            weights are.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    adapter: str
    weight: float | list[float] | list[dict[str, Any]] = 1.0
    revision: str | None = None
    sha256: str | None = None
    alpha: float | None = None
    rslora: bool = False
    parameters: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the bytes of a merged adapter.

    Attributes:
        merge_method: Name of the method.
        adapters: What is merged.
        rank: Rank of the merged adapter, or a rank rule; None: the method's own.
        parameters: Parameters of the method; those left out have their defaults.
        normalize: Weights as they are ("none"), or divided by their "sum" or "abs-sum".
        scale: Factor on the merged delta.
        norm_equalise: Bring every adapter to the mean norm first.
        restore_norm: Bring the result to the "mean" or "weighted-mean" norm of the adapters.
        pico: Shrink shared output directions before the merge.
        svc: Shrink directions counted several times after the merge.
        space: Where an elementwise rule works; None: where the method says.
        basis: Core bases, of the "stacks" or of the "deltas".
        statistics: File of `collect_statistics`, for methods that need one.
        seed: Seed of all randomness.
        dtype: Output dtype; None: the inputs'.
        ranks: One rank for all modules, or one per module.
        extras: What becomes of tensors that are not low-rank factors.
        accept_base_models: Merge adapters of different base models.
        base_model: The base model that one of the adapters must have, if given.
        rename: Changes of module names, FROM=TO, done on every adapter that has such names.
        version: Of this format.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    merge_method: str
    adapters: tuple[AdapterItem, ...]
    rank: int | str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    normalize: Normalize | None = None
    scale: float = 1.0
    norm_equalise: bool = False
    restore_norm: RestoreNorm = "none"
    pico: bool = False
    svc: bool = False
    space: Space | None = None
    basis: Anchor = "stacks"
    statistics: str | None = None
    seed: int = 0
    dtype: str | None = None
    ranks: RankLayout = "uniform"
    extras: ExtrasPolicy = "average"
    accept_base_models: bool = False
    base_model: str | None = None
    rename: tuple[str, ...] = ()
    version: Literal[1] = 1

    def to_yaml(self) -> str:
        """The recipe as YAML; what is not set is left out."""
        data = {"version": self.version, **asdict(self)}
        data["adapters"] = [_non_defaults(item) for item in self.adapters]
        data["rename"] = list(self.rename) or None
        unset = {name: getattr(Semantics(), name) for name in _SEMANTICS}
        data = {
            name: value
            for name, value in data.items()
            if value not in (None, {}) and not (name in unset and value == unset[name])
        }
        return yaml.safe_dump(data, sort_keys=False, width=100)


def read_recipe(path: Path) -> Recipe:
    """Read a recipe file.

    Raises:
        RecipeError: If it is no valid recipe; an unknown key gets the nearest known one.
    """
    note_input(path)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"cannot read {path}: {error.strerror}", "check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not valid YAML: {error}", "repair it") from error
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


def open_recipe(recipe: Recipe, *, allow_pickle: bool = False) -> tuple[Recipe, list[Adapter]]:
    """Open a recipe's adapters at their pinned revisions; globs may stand for many.

    Returns:
        The recipe with one item per adapter, and the adapters.
    """
    adapters: list[Adapter] = []
    items: list[AdapterItem] = []
    for item in recipe.adapters:
        fallback = None
        if item.alpha is not None:
            fallback = AdapterConfig(r=None, lora_alpha=item.alpha, use_rslora=item.rslora)
        pinned = pin(item.adapter, item.revision) if item.revision else item.adapter
        for ref in expand([pinned]):
            source = resolve(ref, allow_pickle=allow_pickle)
            if item.sha256 and sha256(source.weights) != item.sha256:
                raise RecipeError(
                    f"{item.adapter}: its weights are not those the recipe was made from",
                    "get the original file, or remove sha256 from the recipe",
                )
            # A pinned reference keeps the name the user knows it by.
            name = item.adapter if item.revision else ref
            adapters.append(open_adapter(replace(source, ref=name), fallback=fallback))
            items.append(replace(item, adapter=name))
    return replace(recipe, adapters=tuple(items)), rename_all(adapters, recipe.rename)


def plan_recipe(recipe: Recipe, adapters: Sequence[Adapter]) -> MergePlan:
    """Plan what a recipe says, with its adapters opened, one per item.

    Raises:
        RecipeError: If it names another base model than the adapters do.
    """
    bases = {a.config.base_model for a in adapters} - {None}
    if recipe.base_model and bases and recipe.base_model not in bases:
        names = ", ".join(sorted(map(str, bases)))
        raise RecipeError(
            f"base_model is {recipe.base_model!r}, the adapters' is {names}",
            "correct base_model, or leave it out",
        )
    return plan_merge(
        adapters,
        method=recipe.merge_method,
        rank=recipe.rank,
        weights=[item.weight for item in recipe.adapters],
        parameters=recipe.parameters,
        own_parameters=[item.parameters for item in recipe.adapters],
        semantics={name: getattr(recipe, name) for name in _SEMANTICS},
        statistics=recipe.statistics,
        seed=recipe.seed,
        dtype=recipe.dtype,
        layout=recipe.ranks,
        extras=recipe.extras,
        accept_base_models=recipe.accept_base_models,
    )


def resolved_recipe(recipe: Recipe, plan: MergePlan, adapters: Sequence[Adapter]) -> Recipe:
    """The recipe with sources pinned, every parameter written out, adapters of weight 0 left out.

    Adapters stand in the order of their names, unless theirs on the command line has a meaning.
    """
    if recipe.extras == "first":
        pairs = zip(adapters, recipe.adapters, strict=True)
        items = [
            _item(adapter, item.weight, item.parameters)
            for adapter, item in pairs
            if ByModule.of(item.weight).constant != 0
        ]
    else:
        items = [
            _item(
                plan.alignment.adapters[i],
                plan.weights[i].to_data(),
                {name: value.to_data() for name, value in plan.own[i].items()},
            )
            for i in plan.by_name
        ]
    bases = {a.config.base_model for a in plan.alignment.adapters} - {None}
    return replace(
        recipe,
        merge_method=plan.method.name,
        adapters=tuple(items),
        rank=_rank_value(plan),
        parameters={n: v for n, v in asdict(plan.options).items() if v is not None},
        accept_base_models=len(bases) > 1,
    )


def _rank_value(plan: MergePlan) -> int | str | None:
    if plan.rule.kind == "fixed":
        return int(plan.rule.value or 0)
    return None if plan.rule.kind == "units" else str(plan.rule)


def _item(adapter: Adapter, weight: Any, parameters: Mapping[str, Any]) -> AdapterItem:
    source = adapter.source
    bare = source is not None and source.config is None
    return AdapterItem(
        adapter=adapter.name,
        weight=weight,
        revision=source.revision if source else None,
        sha256=sha256(source.weights) if source else None,
        alpha=adapter.config.lora_alpha if bare else None,
        rslora=adapter.config.use_rslora if bare else False,
        parameters=dict(parameters),
    )


def _non_defaults(value: Any) -> dict[str, Any]:
    """Fields of a dataclass that say something."""
    found = {}
    for spec in fields(value):
        default = spec.default_factory() if spec.default_factory is not MISSING else spec.default
        if getattr(value, spec.name) != default:
            found[spec.name] = getattr(value, spec.name)
    return found


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
