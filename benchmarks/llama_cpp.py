"""GGUF adapters against llama.cpp's own converter, one tiny model of every type that is written.

    git clone https://github.com/ggml-org/llama.cpp   # or the sdist of llama-cpp-python 0.3.36
    python benchmarks/llama_cpp.py llama.cpp [MODEL_TYPE ...]

Prints, for each type, the modules and the largest relative distance of their deltas.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

import lora_merge
from lora_merge.reshape.gguf_names import ARCHITECTURES

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS: dict[str, dict[str, int]] = {
    "mixtral": {"num_local_experts": 3},
    "qwen2_moe": {
        "num_experts": 3, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24
    },
    "qwen3_moe": {"num_experts": 3, "moe_intermediate_size": 24},
}  # fmt: skip


def save(kind: str, folder: Path) -> tuple[Path, Path]:
    """A random model and an adapter of all its linear layers but the head and the routers."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES, **EXPERTS.get(kind, {}))
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder / "base")
    targets = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and not name.endswith((".gate", "lm_head"))
    }
    adapter = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, target_modules=sorted(targets)))
    for name, weight in adapter.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.3)
    adapter.save_pretrained(folder / "adapter", save_embedding_layers=False)
    return folder / "base", folder / "adapter"


def distance(ours: Any, theirs: Any) -> float:
    """Largest relative distance of a delta; both must have the same modules."""
    if ours.modules.keys() != theirs.modules.keys() or ours.config != theirs.config:
        return float("inf")
    return max(
        float((one.delta() - other.delta()).norm() / one.delta().norm())
        for name in ours.modules
        for one, other in zip(ours.stacks(name), theirs.stacks(name), strict=True)
    )


def main(checkout: str, *kinds: str) -> None:
    script = Path(checkout) / "convert_lora_to_gguf.py"
    for kind in kinds or [k for k in ARCHITECTURES if k != "gemma3"]:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            base, source = save(kind, folder)
            theirs = folder / "theirs.gguf"
            command = [sys.executable, script, "--base", base, "--outfile", theirs, source]
            subprocess.run(command, check=True, capture_output=True, env={**os.environ})
            ours = lora_merge.convert(source, folder / "ours", to="gguf", base=base)
            pair = (ours, lora_merge.open_adapter(theirs))
            print(f"{kind:12} {len(pair[0].modules):3} modules  {distance(*pair):.1e}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
