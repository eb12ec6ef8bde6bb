"""`adapter_config.json`: what PEFT's LoRA says of itself, read strictly."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lora_merge.adapters.dialects.config_patterns import PatternError, first_match, matcher
from lora_merge.errors import AdapterError
from lora_merge.files.documents import parse_json, read_json, validated

# The types whose `r` is the rank of every module.
_LOW_RANK = ("LORA", "ADALORA", "SORA")

# One rank for all modules, or `rank_pattern` and `alpha_pattern`.
RankLayout = Literal["uniform", "per-module"]
# Where MoE experts stand (`identity/expert_choice.py`).
ExpertLayout = Literal["per-expert", "stacked", "stacked-0.18"]
# Squares of a delta scaled by more would leave the range of float32.
_LARGEST_ALPHA = 1e15


@dataclass(frozen=True)
class _Stored:
    """The fields of an `adapter_config.json` that are understood, as PEFT writes them."""

    peft_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    task_type: str | None = None
    r: int | None = 8
    init_r: int | None = 12
    lora_alpha: float | None = 8
    use_rslora: bool | None = False
    # AdaLoRA's field of this name says which units were kept, not how many there are.
    rank_pattern: dict[str, int] | dict[str, list[bool]] | None = None
    alpha_pattern: dict[str, float] | None = None
    target_modules: str | list[str] | None = None
    target_parameters: list[str] | None = None
    exclude_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    modules_to_save: list[str] | None = None
    fan_in_fan_out: bool | None = False
    bias: str | bool | None = None
    lora_bias: bool | None = False
    init_lora_weights: str | bool | None = True
    ensure_weight_tying: bool | None = False
    peft_version: str | None = None


@dataclass(frozen=True)
class AdapterConfig:
    """The part of a LoRA config that decides what its tensors mean.

    Attributes:
        base_model: Name or path of the base model, None where the config does not say.
        revision: Revision of the base model.
        r: Default rank; None means that of the tensors (a bare file without a config).
        lora_alpha: Default alpha.
        use_rslora: Scaling is alpha / sqrt(r) instead of alpha / r (arXiv 2312.03732).
        rank_pattern: Rank by module-name pattern; the first match in order wins.
        alpha_pattern: Alpha by module-name pattern; the first match in order wins.
        target_modules: Names or one regular expression, as stored.
        target_parameters: Parameters (MoE experts) that are adapted directly.
        fan_in_fan_out: The base stores (in, out) weights (GPT-2's Conv1D).
        bias: "none", "all" or "lora_only".
        lora_bias: B has a bias vector of its own.
        modules_to_save: Names of modules stored whole.
        task_type: PEFT's task type.
        init: `init_lora_weights` as stored.
        partial: Whether layers are selected in a way that names alone do not tell.
        init_r: AdaLoRA: the rank that training started from. It sets the scaling of whatever rank
            pruning left; None for a LoRA.
        peft_type: "LORA", or what else the file says, in capitals.
        architecture: llama.cpp's name of the model's architecture, of a GGUF file.
        raw: The JSON object as stored.
    """

    base_model: str | None = None
    revision: str | None = None
    r: int | None = 8
    lora_alpha: float = 8
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    target_modules: tuple[str, ...] | str | None = None
    target_parameters: tuple[str, ...] = ()
    fan_in_fan_out: bool = False
    bias: str = "none"
    lora_bias: bool = False
    modules_to_save: tuple[str, ...] = ()
    task_type: str | None = None
    init: str | bool | None = True
    partial: bool = False
    init_r: int | None = None
    peft_type: str = "LORA"
    architecture: str | None = None
    raw: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def rank_of(self, module: str) -> int | None:
        """Configured rank of a module (PEFT's matching rules), None if there is none."""
        key = first_match(self.rank_pattern, module)
        return self.r if key is None else self.rank_pattern[key]

    def scaling_of(self, module: str, rank: int) -> float:
        """Scaling of a module of the given rank: alpha / r, or alpha / sqrt(r) with rsLoRA.

        AdaLoRA's is alpha / (init_r + 1e-5), as PEFT computes it, without patterns.
        """
        if self.init_r is not None:
            return (self.lora_alpha if self.lora_alpha > 0 else rank) / (self.init_r + 1e-5)
        key = first_match(self.alpha_pattern, module)
        alpha = self.lora_alpha if key is None else self.alpha_pattern[key]
        return alpha / rank**0.5 if self.use_rslora else alpha / rank


def read_config(path: Path, adapter: str) -> AdapterConfig:
    """Read an `adapter_config.json`.

    Args:
        path: The file.
        adapter: The adapter's name, for messages.

    Raises:
        AdapterError: If the file is no valid config.
    """
    raw = read_json(path, adapter, error=AdapterError)
    return _parse_object(raw, adapter, str(path))


def parse_config_text(text: str, adapter: str) -> AdapterConfig:
    """Turn the text of an `adapter_config.json` into an `AdapterConfig`.

    Raises:
        AdapterError: If it is no valid config.
    """
    raw = parse_json(text, f"{adapter}: its config", error=AdapterError)
    return _parse_object(raw, adapter, "its config")


def _parse_object(raw: Any, adapter: str, where: str) -> AdapterConfig:
    if not isinstance(raw, dict):
        raise AdapterError(f"{adapter}: {where} holds no JSON object", "repair it")
    return parse_config(raw, adapter)


def parse_config(raw: Mapping[str, Any], adapter: str) -> AdapterConfig:
    """Turn a config's JSON object into an `AdapterConfig`.

    Raises:
        AdapterError: If a field is wrong.
    """
    what = f"{adapter}: adapter_config.json has a field of the wrong type"
    said = validated(_Stored, dict(raw), what, "repair it", error=AdapterError)
    kind = str(raw.get("peft_type", "missing")).upper()
    adaptive = kind == "ADALORA"
    if said.lora_alpha is None and kind != "SUPERTUNING":  # which has one beside its LoRA alone
        raise AdapterError(f"{what}: lora_alpha is null", "repair it")
    config = AdapterConfig(
        base_model=said.base_model_name_or_path or None,
        revision=said.revision or None,
        r=None if adaptive else said.r,
        lora_alpha=8 if said.lora_alpha is None else said.lora_alpha,
        use_rslora=bool(said.use_rslora),
        rank_pattern={} if adaptive else _ranks(said.rank_pattern or {}, what),
        alpha_pattern=said.alpha_pattern or {},
        target_modules=_targets(said.target_modules),
        target_parameters=tuple(said.target_parameters or ()),
        fan_in_fan_out=bool(said.fan_in_fan_out),
        bias=str(said.bias or "none"),
        lora_bias=bool(said.lora_bias),
        modules_to_save=tuple(said.modules_to_save or ()),
        task_type=said.task_type or None,
        init=said.init_lora_weights,
        partial=bool(said.layers_to_transform or said.layers_pattern or said.exclude_modules),
        init_r=said.init_r if adaptive else None,
        peft_type=kind,
        raw=raw,
    )
    check_alphas(config, adapter)
    if kind in _LOW_RANK:
        _check_ranks(config, adapter)
    _check_patterns(config, adapter)
    return config


def check_alphas(config: AdapterConfig, adapter: str) -> None:
    """Refuse an alpha that no delta bears, from a file or from the command line.

    Raises:
        AdapterError: Naming it; JSON as Python writes it may say NaN.
    """
    alphas = {"lora_alpha": config.lora_alpha, **config.alpha_pattern}
    wrong = [f"{key} = {value}" for key, value in alphas.items() if not abs(value) < _LARGEST_ALPHA]
    if wrong:
        raise AdapterError(f"{adapter}: no usable alpha ({', '.join(wrong)})", "correct it")


def _check_ranks(config: AdapterConfig, adapter: str) -> None:
    default = {"r": config.r} if config.init_r is None else {"init_r": config.init_r}
    ranks = {**default, **config.rank_pattern}
    wrong = [f"{key} = {value}" for key, value in ranks.items() if value is None or value < 1]
    if wrong:
        raise AdapterError(
            f"{adapter}: adapter_config.json has no positive rank ({', '.join(wrong)})", "repair it"
        )


def _check_patterns(config: AdapterConfig, adapter: str) -> None:
    """Patterns are regular expressions; a broken one would only show at the first module."""
    fields = {
        "rank_pattern": (tuple(config.rank_pattern), False),
        "alpha_pattern": (tuple(config.alpha_pattern), False),
        "target_modules": ((config.target_modules,), True),
        "exclude_modules": ((config.raw.get("exclude_modules"),), True),
    }
    for name, (patterns, whole) in fields.items():
        for pattern in patterns:
            try:
                if isinstance(pattern, str):
                    matcher(pattern, whole=whole)
            except PatternError as error:
                raise AdapterError(
                    f"{adapter}: {name} in adapter_config.json has {pattern!r:.100}, which is no "
                    f"regular expression of module names: {error}",
                    "repair it",
                ) from error


def matching_keys(pattern: Iterable[str], module: str) -> list[str]:
    """Patterns that match the module's name or a dotted suffix of it, as PEFT does, in order."""
    return [key for key in pattern if matcher(key)(module)]


def _ranks(pattern: Mapping[str, Any], what: str) -> dict[str, int]:
    wrong = [key for key, rank in pattern.items() if not isinstance(rank, int)]
    if wrong:
        raise AdapterError(f"{what}: rank_pattern.{wrong[0]:.100} is no number", "repair it")
    return dict(pattern)


def _targets(value: str | list[str] | None) -> tuple[str, ...] | str | None:
    return tuple(sorted(value)) if isinstance(value, list) else value
