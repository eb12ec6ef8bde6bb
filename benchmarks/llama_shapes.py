"""Make random adapters of Llama-3-8B's shape: 32 layers, seven projections, bf16.

    python benchmarks/llama_shapes.py DIR [--adapters 4] [--rank 16]

The factors are random; speed and memory do not depend on what is in them.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

NUM_LAYERS = 32
PROJECTIONS = {  # name: (d_out, d_in)
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}


def make_adapter(
    folder: Path,
    rank: int,
    seed: int,
    num_layers: int = NUM_LAYERS,
    projections: dict[str, tuple[int, int]] = PROJECTIONS,
) -> Path:
    """Write one adapter unless it is there."""
    weights = folder / "adapter_model.safetensors"
    if weights.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(num_layers):
        for name, (d_out, d_in) in projections.items():
            stem = f"base_model.model.model.layers.{layer}.{name}"
            a = torch.randn(rank, d_in, generator=random) * d_in**-0.5
            b = torch.randn(d_out, rank, generator=random) * 0.02
            tensors[f"{stem}.lora_A.weight"] = a.bfloat16()
            tensors[f"{stem}.lora_B.weight"] = b.bfloat16()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "llama-3-8b-shapes",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted(name.rpartition(".")[2] for name in PROJECTIONS),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, weights, metadata={"format": "pt"})
    return folder


def make_adapters(folder: Path, count: int, rank: int, num_layers: int = NUM_LAYERS) -> list[Path]:
    """Write `count` adapters below a folder; those already there are kept."""
    return [
        make_adapter(folder / f"r{rank}-{index:03d}", rank, index, num_layers)
        for index in range(count)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    arguments = parser.parse_args()
    for folder in make_adapters(arguments.folder, arguments.adapters, arguments.rank):
        print(folder)


if __name__ == "__main__":
    main()
