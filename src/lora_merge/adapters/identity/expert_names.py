"""Names of stacked experts' parameters, and the order in which models define them."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

from lora_merge.adapters.forms import ModuleSpec
from lora_merge.adapters.module_names import WRAPPED

_EXPERT_MODULE = re.compile(r"(?P<stem>(?:.*\.)?experts)\.(?P<expert>\d+)\.(?P<leaf>[^.]+)")
# As transformers' experts define them; PEFT nests its wrappers in this order.
_DEFINED = ("gate_proj", "w1", "gate_up_proj", "up_proj", "w3", "v1", "down_proj", "w2")


def definition_order(parameters: Iterable[str]) -> list[str] | None:
    """Parameters of one module as the model defines them; None where that is not known."""
    names = set(parameters)
    if len(names) == 1:
        return list(names)
    return sorted(names, key=_DEFINED.index) if names <= set(_DEFINED) else None


class ExpertPlace(NamedTuple):
    """Where the module of one expert stands, as transformers 4 has them (`experts.3.up_proj`).

    Attributes:
        stem: Path of the experts (`model.layers.0.mlp.experts`).
        expert: The expert's number.
        leaf: Which of its projections.
    """

    stem: str
    expert: int
    leaf: str


def expert_place(name: str) -> ExpertPlace | None:
    """The place of one expert's module; None where a module is none."""
    match = _EXPERT_MODULE.fullmatch(name)
    return match and ExpertPlace(match["stem"], int(match["expert"]), match["leaf"])


def is_expert_module(name: str) -> bool:
    """Whether a module is a projection of one expert."""
    return expert_place(name) is not None


def equal_experts(ranks: Mapping[str, int]) -> dict[str, int]:
    """Ranks in which all experts' own modules have one.

    PEFT stacks them under transformers 5, which takes one rank, and takes it from the config's `r`.
    """
    largest = max((rank for name, rank in ranks.items() if is_expert_module(name)), default=0)
    return {n: largest if is_expert_module(n) else rank for n, rank in ranks.items()}


def with_wrappers(modules: Mapping[str, ModuleSpec]) -> dict[str, ModuleSpec]:
    """Modules that will be written together, each with the place where PEFT has its factors."""
    stems: dict[str, list[str]] = {}
    for spec in modules.values():
        if spec.parameter is not None:
            stems.setdefault(_stem(spec), []).append(spec.parameter)
    placed = {}
    for name, spec in modules.items():
        if spec.parameter is not None:
            parameters = stems[_stem(spec)]
            order = definition_order(parameters) or sorted(parameters)
            depth = len(order) - 1 - order.index(spec.parameter)
            spec = replace(spec, wrapper=_stem(spec) + f".{WRAPPED}" * depth)
        placed[name] = spec
    return placed


def _stem(spec: ModuleSpec) -> str:
    """The module that owns an adapted parameter."""
    return spec.tensor.removesuffix(f".{spec.parameter}")
