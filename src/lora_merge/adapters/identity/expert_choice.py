"""Experts in the layout that is asked for, whatever they were read in.

| layout       | modules                                   | who reads it                        |
| ------------ | ----------------------------------------- | ----------------------------------- |
| per-expert   | `experts.3.up_proj`                       | transformers 4, vLLM, PEFT (stacks) |
| stacked      | `experts.gate_up_proj`                    | PEFT since 0.19 with transformers 5 |
| stacked-0.18 | the same, deltas as the parameter lies    | PEFT 0.17 and 0.18                  |
| switch       | `switch_mlp.up_proj`, 3-D, expert first   | mlx-lm                              |
"""

from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial

from torch import Tensor

from lora_merge.adapters.adapter import Adapter
from lora_merge.adapters.base_weights import BaseModel, CheckpointBase
from lora_merge.adapters.config import ExpertLayout
from lora_merge.adapters.dialects.peft_experts import INPUTS_FIRST, turned
from lora_merge.adapters.forms import ModuleSpec
from lora_merge.adapters.identity.expert_layout import (
    apart,
    has_expert_modules,
    one_expert,
    stacked,
)
from lora_merge.adapters.identity.expert_names import expert_place
from lora_merge.adapters.units import Units
from lora_merge.adapters.writer import NEW_EXPERTS
from lora_merge.errors import AdapterError

_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def in_layout(
    adapter: Adapter, layout: ExpertLayout, names: Collection[str], base: BaseModel | None
) -> Adapter:
    """An adapter with its experts in a layout; exact.

    Args:
        adapter: The adapter; without experts it stays as it is.
        layout: Which.
        names: Tensors of the base, which tell what it calls an expert's modules; may be empty.
        base: The base model: the number of experts, and how it stores them.

    Raises:
        AdapterError: If the base is needed and not there, or an expert has no such layout.
    """
    if layout == "per-expert":
        wanted = {
            f"{stem}.0.{part}.weight"
            for spec in adapter.modules.values()
            for stem, _, parameter in [spec.name.rpartition(".")]
            for part in _PARTS.get(parameter, ())
            if spec.form == "experts"
        }
        done = apart(apart(adapter, [n for n in names if ".experts." in n]), wanted)
        _refuse_left(done, lambda spec: spec.form == "experts", layout)
        return done
    done = all_stacked(adapter, base)
    if layout == "stacked-0.18":
        return _as_the_parameter_lies(done, base)
    return done


def all_in_layout(
    adapters: list[Adapter], layout: ExpertLayout | None, base: CheckpointBase | None
) -> list[Adapter]:
    """Adapters with their experts in one layout; None leaves them as they are."""
    if layout is None:
        return adapters
    names = () if base is None else base.checkpoint.tensors
    return [in_layout(adapter, layout, names, base) for adapter in adapters]


def peft_of(layout: ExpertLayout | None) -> str:
    """The PEFT that stores experts as a layout has them."""
    return "0.18.1" if layout == "stacked-0.18" else NEW_EXPERTS


def all_stacked(adapter: Adapter, base: BaseModel | None) -> Adapter:
    """An adapter with one module for all experts.

    Raises:
        AdapterError: If the number of experts is not known, or one has a projection of its own.
    """
    counts = {s.name.rpartition(".")[0]: s.num_experts for s in _experts(adapter)}
    if has_expert_modules(adapter):
        for name in adapter.modules:
            place = expert_place(name)
            if place is None:
                continue
            stem = place[0].replace("block_sparse_moe.experts", "mlp.experts")
            count = counts.get(stem) or (None if base is None else base.experts(place[0]))
            if count is None:
                raise AdapterError(
                    f"{adapter.name}: how many experts stand below {place[0]} is not known",
                    "name the base model: --base DIR",
                )
            counts[stem] = count
    done = stacked(adapter, counts)
    _refuse_left(done, lambda spec: expert_place(spec.name) is not None, "stacked")
    return done


def as_switch(adapter: Adapter, base: BaseModel | None) -> Adapter:
    """Experts under mlx-lm's names: gate and up apart, `switch_mlp` in the place of `experts`."""
    modules: dict[str, ModuleSpec] = {}
    for name, spec in all_stacked(adapter, base).modules.items():
        stem, _, parameter = name.rpartition(".")
        parts = _PARTS.get(parameter, ())
        if spec.form != "experts" or not parts or not stem.endswith(".experts"):
            modules[name] = spec
            continue
        place = stem.removesuffix("experts") + "switch_mlp"
        if base is not None and base.kind == "mixtral":
            place = place.replace(".mlp.switch_mlp", ".block_sparse_moe.switch_mlp")
        rows = spec.d_out // len(parts)
        for number, part in enumerate(parts):
            units = partial(_rows, spec.recipe.units, number * rows, rows)
            modules[f"{place}.{part}"] = replace(
                spec,
                name=f"{place}.{part}",
                d_out=rows,
                parameter=None,
                recipe=replace(spec.recipe, units=units),
            )
    return replace(adapter, modules=dict(sorted(modules.items())))


def from_switch(adapter: Adapter) -> Adapter:
    """mlx-lm's stacked experts as modules of single experts, by the names that checkpoints have."""
    modules: dict[str, ModuleSpec] = {}
    for name, spec in adapter.modules.items():
        stem, _, leaf = name.rpartition(".")
        if spec.form != "experts" or not stem.endswith(".switch_mlp"):
            modules[name] = spec
            continue
        place = stem.removesuffix("switch_mlp") + "experts"
        if "block_sparse_moe" in place:
            leaf = _MIXTRAL.get(leaf, leaf)
        for expert in range(spec.num_experts):
            one = f"{place}.{expert}.{leaf}"
            modules[one] = one_expert(spec, one, expert, 0, spec.d_out)
    return replace(adapter, modules=dict(sorted(modules.items())))


def _rows(
    units: Callable[..., Units], start: int, count: int, *tensors: Tensor, **base: object
) -> Units:
    a, b = units(*tensors, **base)
    return a, b[start : start + count]


def _as_the_parameter_lies(adapter: Adapter, base: BaseModel | None) -> Adapter:
    """PEFT 0.18 took (E, m, n) for (E, in, out); where it is (E, out, in), A and B change roles."""
    if base is None or not base.kind:
        raise AdapterError(
            f"{adapter.name}: PEFT 0.18 stored experts as the model's parameter lies",
            "name the base model: --base DIR",
        )
    if base.kind in INPUTS_FIRST:
        return adapter
    modules = dict(adapter.modules)
    for spec in _experts(adapter):
        recipe = spec.recipe
        units = partial(_turned, recipe.units, spec.num_experts)
        modules[spec.name] = replace(
            spec, d_out=spec.d_in, d_in=spec.d_out, recipe=replace(recipe, units=units)
        )
    return replace(adapter, modules=modules)


def _turned(units: Callable[..., Units], experts: int, *tensors: Tensor, **base: object) -> Units:
    return turned(*units(*tensors, **base), experts=experts)


def _experts(adapter: Adapter) -> list[ModuleSpec]:
    return [spec for spec in adapter.modules.values() if spec.form == "experts"]


def _refuse_left(adapter: Adapter, left: Callable[[ModuleSpec], bool], layout: str) -> None:
    for name, spec in adapter.modules.items():
        if left(spec):
            raise AdapterError(
                f"{adapter.name}: {name} has no place in the layout {layout}",
                "only gated experts (gate_proj, up_proj, down_proj) have it",
            )
