"""Small adapters and stacks for the tests, made in memory from a seed."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lora_merge.adapters.adapter import Adapter, build_adapter
from lora_merge.adapters.config import parse_config
from lora_merge.adapters.rank_stack import RankStack
from lora_merge.files.tensor_file import TensorDict

# module → (d_out, d_in)
SHAPES: dict[str, tuple[int, int]] = {
    "model.layers.0.self_attn.q_proj": (24, 16),
    "model.layers.0.mlp.up_proj": (40, 16),
    "model.layers.1.self_attn.q_proj": (24, 16),
    "model.layers.1.mlp.up_proj": (40, 16),
}


def random_stack(
    ranks: Sequence[int] = (3, 4, 2),
    d_out: int = 14,
    d_in: int = 11,
    *,
    scales: Sequence[float] | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> RankStack:
    """A stack of random adapters."""
    random = torch.Generator().manual_seed(seed)
    scales = scales or [1.0 + 0.5 * i for i in range(len(ranks))]
    return RankStack.of(
        [
            (
                torch.randn(r, d_in, generator=random, dtype=torch.float64).to(dtype),
                torch.randn(d_out, r, generator=random, dtype=torch.float64).to(dtype),
                s,
            )
            for r, s in zip(ranks, scales, strict=True)
        ]
    )


def adapter_parts(
    *,
    r: int = 4,
    alpha: float = 8,
    seed: int = 0,
    shapes: Mapping[str, tuple[int, int]] = SHAPES,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, tensors) of a random PEFT LoRA; `config` overrides fields."""
    random = torch.Generator().manual_seed(seed)
    full = {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": alpha,
        "base_model_name_or_path": "tiny-base",
        "target_modules": sorted({name.rpartition(".")[2] for name in shapes}),
        "task_type": "CAUSAL_LM",
        **config,
    }
    rank_of = parse_config(full, "test").rank_of
    tensors = {}
    for name, (d_out, d_in) in shapes.items():
        rank = rank_of(name)
        a = torch.randn(rank, d_in, generator=random) / d_in**0.5
        b = torch.randn(d_out, rank, generator=random) * 0.1
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.to(dtype)
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.to(dtype)
    return full, tensors


def make_adapter(name: str = "adapter", **parts: Any) -> Adapter:
    """A random adapter in memory; arguments as for `adapter_parts`."""
    config, tensors = adapter_parts(**parts)
    return build_adapter(name, parse_config(config, name), TensorDict(tensors))


def save_adapter(folder: Path, **parts: Any) -> Path:
    """A random adapter in a directory; arguments as for `adapter_parts`."""
    config, tensors = adapter_parts(**parts)
    return save_parts(folder, config, tensors)


def save_parts(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Write a config and tensors as a PEFT directory."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(dict(tensors), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def save_base(folder: Path, shapes: Mapping[str, tuple[int, ...]] = SHAPES, **config: Any) -> str:
    """A random base model: weights of modules, and 3-D parameters under their own names."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3", **config}))
    g = torch.Generator().manual_seed(7)
    tensors = {name: torch.randn(*shape, generator=g) for name, shape in shapes.items()}
    named = {n if len(t.shape) == 3 else f"{n}.weight": t for n, t in tensors.items()}
    save_file(named, folder / "model.safetensors")
    return str(folder)


def delta(adapter: Adapter, module: str) -> torch.Tensor:
    a, b = adapter.read(module)
    return adapter.modules[module].scaling * b.double() @ a.double()


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = torch.nn.Module()
        self.self_attn.q_proj = torch.nn.Linear(16, 24, bias=False)
        self.mlp = torch.nn.Module()
        self.mlp.up_proj = torch.nn.Linear(16, 40, bias=False)


class Tiny(torch.nn.Module):
    """The modules that the builders' adapters adapt."""

    def __init__(self) -> None:
        super().__init__()
        self.model = torch.nn.Module()
        self.model.layers = torch.nn.ModuleList([Block(), Block()])
