"""What a search may change in a recipe, and the recipe that a trial means."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, get_args, get_origin

from lora_merge.adapters.adapter import Adapter
from lora_merge.adapters.alignment import align
from lora_merge.adapters.module_names import kind_of
from lora_merge.arguments import nearest
from lora_merge.errors import MethodError
from lora_merge.merge.methods.method import Method
from lora_merge.merge.methods.registry import find_method
from lora_merge.merge.recipe.recipe import Recipe

if TYPE_CHECKING:
    from optuna.trial import BaseTrial

# Anchors of a weight that varies over the layers: first, middle, last.
_ANCHORS = 3
_SCALE, _WEIGHT = (0.1, 2.5), (0.0, 1.5)
OVER = {
    "scale": "factor on the merged delta",
    "weights": "one weight per adapter",
    "layers": "a weight per adapter that varies over the layers",
    "kinds": "a weight per adapter and kind of module",
    "method": "which of several methods",
    "parameters": "the method's own numbers",
    "modules": "which kinds of modules of which adapter to leave out (ENMP's masks)",
}


@dataclass(frozen=True)
class SearchSpace:
    """What may vary.

    Attributes:
        recipe: Where it starts; what does not vary stays as it says.
        names: Of the adapters.
        kinds: Kinds of modules (q_proj, ...), sorted.
        over: Names of `OVER`.
        methods: The methods to choose from.
    """

    recipe: Recipe
    names: tuple[str, ...]
    kinds: tuple[str, ...]
    over: tuple[str, ...]
    methods: tuple[str, ...]

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        adapters: Sequence[Adapter],
        over: Sequence[str],
        methods: Sequence[str] = (),
    ) -> "SearchSpace":
        """The space around a recipe.

        Raises:
            MethodError: If something asked for cannot vary; names the nearest that can.
        """
        for word in over:
            if word not in OVER:
                raise MethodError(f"a search cannot vary {word!r}", nearest(word, OVER))
        weighing = [word for word in ("weights", "layers", "kinds") if word in over]
        if len(weighing) > 1:
            raise MethodError(
                f"{' and '.join(weighing)} both say what the weights are", "name one of them"
            )
        if ("method" in over) != bool(methods):
            raise MethodError(
                "a search over methods needs to know which", "name them, and vary method"
            )
        if "kinds" in over and "modules" in over:
            raise MethodError("weights of kinds can be zero already", "leave modules out")
        for method in methods:
            find_method(method)
        if "parameters" in over and recipe.merge_method == "auto" and not methods:
            raise MethodError("auto has no parameters of its own", "name a method")
        modules = align(adapters, accept_base_models=True).modules
        kinds = tuple(sorted({kind_of(module.name) for module in modules}))
        names = tuple(adapter.name for adapter in adapters)
        return cls(recipe, names, kinds, tuple(over), tuple(methods))

    def start(self) -> dict[str, Any]:
        """The trial that is the recipe itself, as far as the space can say it."""
        found: dict[str, Any] = {}
        if "scale" in self.over and isinstance(self.recipe.scale, float):
            found["scale"] = min(max(self.recipe.scale, _SCALE[0]), _SCALE[1])
        for place in self._weight_places():
            found[f"weight.{place}"] = 1.0
        if "modules" in self.over:
            found |= {f"keep.{i}.{k}": True for i in range(len(self.names)) for k in self.kinds}
        if "method" in self.over:
            first = self.recipe.merge_method
            found["method"] = first if first in self.methods else self.methods[0]
        return found

    def recipe_of(self, trial: "BaseTrial") -> Recipe:
        """The recipe of a trial, which is asked for every value that may vary."""
        recipe = self.recipe
        if "method" in self.over:
            recipe = replace(recipe, merge_method=trial.suggest_categorical("method", self.methods))
        if "scale" in self.over:
            recipe = replace(recipe, scale=trial.suggest_float("scale", *_SCALE, log=True))
        if "parameters" in self.over:
            recipe = replace(recipe, parameters={**recipe.parameters, **_numbers(recipe, trial)})
        weights = {
            place: trial.suggest_float(f"weight.{place}", *_WEIGHT)
            for place in self._weight_places()
        }
        kept = self._kept(trial) if "modules" in self.over else {}
        if not weights and not kept:
            return recipe
        items = [
            replace(item, weight=self._weight(i, item.weight, weights, kept))
            for i, item in enumerate(recipe.adapters)
        ]
        return replace(recipe, adapters=tuple(items))

    def _weight_places(self) -> list[str]:
        numbers = range(len(self.names))
        if "weights" in self.over:
            return [f"{i}" for i in numbers]
        if "layers" in self.over:
            return [f"{i}.{anchor}" for i in numbers for anchor in range(_ANCHORS)]
        if "kinds" in self.over:
            return [f"{i}.{kind}" for i in numbers for kind in self.kinds]
        return []

    def _kept(self, trial: "BaseTrial") -> dict[int, list[str]]:
        """Kinds of each adapter that stay."""
        return {
            i: [k for k in self.kinds if trial.suggest_categorical(f"keep.{i}.{k}", [True, False])]
            for i in range(len(self.names))
        }

    def _weight(
        self,
        adapter: int,
        given: Any,
        weights: Mapping[str, float],
        kept: Mapping[int, Sequence[str]],
    ) -> Any:
        """An adapter's weight in the words of a recipe."""
        value: Any = given
        if "weights" in self.over:
            value = weights[f"{adapter}"]
        elif "layers" in self.over:
            value = [weights[f"{adapter}.{anchor}"] for anchor in range(_ANCHORS)]
        elif "kinds" in self.over:
            return [
                {"filter": f"*.{kind}", "value": weights[f"{adapter}.{kind}"]}
                for kind in self.kinds
            ]
        if adapter not in kept or len(kept[adapter]) == len(self.kinds):
            return value
        dropped = [kind for kind in self.kinds if kind not in kept[adapter]]
        rest = value if isinstance(value, list) else float(value)
        return [
            *({"filter": f"*.{kind}", "value": 0.0} for kind in dropped),
            {"filter": "*", "value": rest},
        ]


def _numbers(recipe: Recipe, trial: "BaseTrial") -> dict[str, Any]:
    """A value for each number among a method's parameters that has two limits."""
    method = find_method(recipe.merge_method)
    found: dict[str, Any] = {}
    for spec in fields(method.options):
        low = _first(spec.metadata, "low", "above")
        high = _first(spec.metadata, "high", "below")
        if low is None or high is None or not _is_number(spec.type):
            continue
        if not _applies(method, {**recipe.parameters, spec.name: (low + high) / 2}, spec.type):
            continue
        name = f"{method.name}.{spec.name}"
        if spec.type is int or spec.type == "int":
            found[spec.name] = trial.suggest_int(name, int(low), int(high))
            continue
        # An end that is excluded is approached to a thousandth of the range.
        inside = 1e-3 * (high - low)
        low += inside if spec.metadata.get("low") is None else 0.0
        high -= inside if spec.metadata.get("high") is None else 0.0
        found[spec.name] = trial.suggest_float(name, low, high)
    return found


def _applies(method: Method, parameters: Mapping[str, Any], kind: Any) -> bool:
    """Whether a parameter has a meaning beside the others (trim has none without dare)."""
    whole = kind is int or kind == "int"
    try:
        method.parse({n: int(v) if whole and v is not None else v for n, v in parameters.items()})
    except MethodError:
        return False
    return True


def _first(metadata: Mapping[str, Any], *names: str) -> float | None:
    return next((metadata[n] for n in names if metadata.get(n) is not None), None)


def _is_number(kind: Any) -> bool:
    kinds: tuple[Any, ...] = get_args(kind) if get_origin(kind) is not None else (kind,)
    return float in kinds or int in kinds
