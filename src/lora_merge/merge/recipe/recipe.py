"""The recipe: everything that decides the bytes of a merged adapter, as data.

Plain data alone is imported here: the commands make their options from these fields, and `--help`
must not import torch.
"""

from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, Literal

from lora_merge.adapters.config import ExpertLayout, RankLayout
from lora_merge.errors import LoraMergeError
from lora_merge.files.header import DTypeName
from lora_merge.options import argument, option

RECIPE_NAME = "lora_merge.yaml"

# units: the stack as it is. factors: A and B apart. delta: the dense matrix, in row blocks.
# aligned: the stack in the columns' common orthonormal basis (KnOTS). core: in both (Core Space).
Space = Literal["units", "factors", "delta", "aligned", "core"]
Normalize = Literal["none", "sum", "abs-sum"]
RestoreNorm = Literal["none", "mean", "weighted-mean"]
Smooth = Literal["none", "flat", "linear"]
Anchor = Literal["stacks", "deltas"]
ExtrasPolicy = Literal["average", "first", "drop", "error"]


ABOUT_SCALE = (
    "factor on the merged delta; auto is decided from the adapters and the method, 1 is the method "
    "as published"
)


class RecipeError(LoraMergeError):
    """A recipe that cannot be read or does not fit its inputs."""


@dataclass(frozen=True, kw_only=True)
class Semantics:
    """What every method has in common: weights, scale, norms, steps before and after."""

    normalize: Normalize | None = option(
        None,
        "weights as they are, or divided by their sum or sum of magnitudes",
        unset="the method's",
    )
    scale: float | Literal["auto"] = option(1.0, ABOUT_SCALE)
    norm_equalise: bool = option(
        False, "bring every adapter to the mean norm first, module by module"
    )
    restore_norm: RestoreNorm = option(
        "none", "bring the result to the (weighted) mean of the adapters' norms"
    )
    smooth: Smooth = option(
        "none",
        "flatten every adapter's singular values first, their sum kept: all equal, or a line from "
        "at most 5 to 1 (DC-Merge)",
    )
    pico: bool = option(False, "shrink shared output directions before the merge (Pico)")
    svc: bool = option(False, "shrink directions counted several times after the merge (SVC)")
    space: Space | None = option(None, "where an elementwise rule works", unset="the method's")
    basis: Anchor = option(
        "deltas", "core bases: of the deltas (gauge-free), or of the factors' stacks (the authors')"
    )
    exact: bool = option(
        False, "decompose sums of many units whole, not their leading directions alone"
    )

    @property
    def factor(self) -> float:
        """The scale as a number; 1 as long as it is to be decided."""
        return 1.0 if self.scale == "auto" else self.scale


@dataclass(frozen=True, kw_only=True)
class RecipeOptions(Semantics):
    """What else a merge can be told, whatever the method."""

    statistics: str | None = option(None, "file of collect_statistics, for methods that need one")
    seed: int = option(0, "seed of all randomness")
    dtype: DTypeName | None = option(None, "dtype of the result", unset="the inputs'")
    ranks: RankLayout = option(
        "uniform",
        "pad all modules to one rank, or write rank_pattern (llama.cpp ignores it)",
    )
    extras: ExtrasPolicy = option(
        "average", "what to do with biases and modules that were saved whole"
    )
    experts: ExpertLayout | None = option(
        None,
        "layout of MoE experts in the result: a module each, or one parameter as PEFT stores it "
        "since 0.19, or before",
        unset="the inputs'",
    )
    accept_base_models: bool = option(False, "accept adapters that name different base models")
    base_model: str | None = argument(
        None, "the base model that one of the adapters must have, if given"
    )
    rename: tuple[str, ...] = argument(
        (), "changes of module names, FROM=TO, done on every adapter that has such names"
    )
    base: str | None = option(
        None, "base model's directory: checks names, tells what depends on its weights"
    )


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
class Recipe(RecipeOptions):
    """Everything that decides the bytes of a merged adapter.

    Attributes:
        merge_method: Name of the method.
        adapters: What is merged.
        rank: Rank of the merged adapter, or a rank rule; None: the method's own.
        parameters: Parameters of the method; those left out have their defaults.
        statistics: File of `collect_statistics`, for methods that need one.
        seed: Seed of all randomness.
        dtype: Output dtype; None: the inputs'.
        ranks: One rank for all modules, or one per module.
        extras: What becomes of tensors that are not low-rank factors.
        experts: Layout of MoE experts in the result; None: the inputs'.
        accept_base_models: Merge adapters of different base models.
        base_model: The base model that one of the adapters must have, if given.
        rename: Changes of module names, FROM=TO, done on every adapter that has such names.
        base: The base model's directory, for checks of names and forms that depend on its weights.
        version: Of this format.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    merge_method: str
    adapters: tuple[AdapterItem, ...]
    rank: int | str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    version: Literal[1] = 1

    def to_yaml(self) -> str:
        """The recipe as YAML; what is not set is left out."""
        import yaml  # here: a third of the time that `--help` takes

        names = [spec.name for spec in fields(self) if spec.name not in _FIRST]
        data = {name: getattr(self, name) for name in names}
        first = {name: getattr(self, name) for name in _FIRST}
        data = {**first, **data, "adapters": [_non_defaults(item) for item in self.adapters]}
        data["rename"] = list(self.rename) or None
        unset = {spec.name: spec.default for spec in fields(Semantics)}
        data = {
            name: value
            for name, value in data.items()
            if value not in (None, {}) and not (name in unset and value == unset[name])
        }
        return yaml.safe_dump(data, sort_keys=False, width=100)


# What a reader looks for first.
_FIRST = ("version", "merge_method", "adapters", "rank", "parameters")


def _non_defaults(value: Any) -> dict[str, Any]:
    """Fields of a dataclass that say something."""
    found = {}
    for spec in fields(value):
        default = spec.default_factory() if spec.default_factory is not MISSING else spec.default
        if getattr(value, spec.name) != default:
            found[spec.name] = getattr(value, spec.name)
    return found
