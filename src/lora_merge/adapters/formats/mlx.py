"""Directories for mlx-lm."""

from typing import Any

from torch import Tensor

from lora_merge.adapters.formats.file_format import (
    FileFormat,
    Written,
    by_expert,
    shapes_by_expert,
)
from lora_merge.adapters.forms import ModuleSpec
from lora_merge.adapters.module_names import kind_of, place_of
from lora_merge.errors import AdapterError


def _check(plan: Written) -> None:
    if plan.biases:
        raise AdapterError(f"{plan.biases[0]} has a bias on B, which mlx-lm has not", "leave it")
    if len(set(plan.ranks.values())) > 1:
        raise AdapterError("mlx-lm reads one rank for all modules", "leave out --ranks per-module")
    for name, spec in plan.modules.items():
        if spec.form == "conv" or (spec.form == "experts" and ".switch_mlp." not in name):
            raise AdapterError(
                f"{name} is an adapter of {spec.form}, which mlx-lm has not in this layout",
                "write it for PEFT",
            )


def _shapes(spec: ModuleSpec, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if spec.form == "experts":
        return shapes_by_expert(spec, rank)
    return (spec.d_in, rank), (rank, spec.d_out)


def _arrange(spec: ModuleSpec, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return by_expert(spec, a, b) if spec.form == "experts" else (a.mT, b.mT)


def _config(plan: Written) -> dict[str, Any]:
    """mlx-lm puts a LoRA on the named modules of the last `num_layers` layers."""
    places = {name: place_of(name) for name in plan.modules}
    inside = {n: p for n, p in places.items() if kind_of(p.stack) == "layers"}
    layers = [p.layer for p in inside.values() if p.layer is not None]
    keys = {inside[name].kind if name in inside else name for name in plan.modules}
    return {
        "fine_tune_type": "lora",
        "model": plan.config.get("base_model_name_or_path"),
        # Of a model with more layers than this all are taken; modules that no layer of the file
        # has get a LoRA whose B is zero.
        "num_layers": max(layers, default=-1) + 1,
        "lora_parameters": {
            "rank": max(plan.ranks.values()),
            "scale": 1.0,
            "dropout": 0.0,
            "keys": sorted(keys),
        },
    }


MLX = FileFormat(
    name="mlx",
    title="mlx-lm",
    naming="transformers",
    weights="adapters.safetensors",
    keys=lambda spec: (f"{spec.name}.lora_a", f"{spec.name}.lora_b"),
    shapes=_shapes,
    arrange=_arrange,
    config=_config,
    metadata=lambda plan: {"format": "mlx"},
    check=_check,
)
