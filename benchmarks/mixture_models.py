"""The models of the mixture benchmarks: a small Llama, four adapters, ours and PEFT's mixtures.

Eight layers, hidden 512, r = 16 on seven projections, random weights.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from lora_merge.mixture.mixture import Mixture
from lora_merge.mixture.runtime.attach import load_mixture

LEAVES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EXPERTS, RANK = 4, 16
SETTINGS: dict[str, dict[str, int]] = {
    "constant": {}, "request": {}, "arrow": {"top_k": 2}, "spectr": {}, "meteora": {},
    "smora": {"top_k": 16}, "sequence": {"top_k": 2}, "xlora": {},
}  # fmt: skip
JOINED = ("arrow", "meteora", "smora", "xlora")  # measured in the layout "rows" as well


def build(vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=8, vocab_size=vocabulary, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def save_experts(model: LlamaForCausalLM, folder: Path) -> list[str]:
    random = torch.Generator().manual_seed(1)
    paths = []
    for expert in range(EXPERTS):
        tensors = {}
        for name, module in model.named_modules():
            if name.rpartition(".")[2] in LEAVES:
                stem = f"base_model.model.{name}.lora_"
                shape = (RANK, module.in_features)
                tensors[stem + "A.weight"] = torch.randn(shape, generator=random) * 0.05
                shape = (module.out_features, RANK)
                tensors[stem + "B.weight"] = torch.randn(shape, generator=random) * 0.05
        path = folder / f"expert{expert}"
        path.mkdir()
        config = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK,
            "target_modules": list(LEAVES), "base_model_name_or_path": "bench",
        }  # fmt: skip
        (path / "adapter_config.json").write_text(json.dumps(config))
        save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
        paths.append(str(path))
    return paths


def peft_models(vocabulary: int, paths: list[str]) -> dict[str, torch.nn.Module]:
    from peft import ArrowConfig, PeftModel, XLoraConfig, create_arrow_model, get_peft_model

    base = build(vocabulary)
    base.config.use_cache = False
    adapters = {str(i): path for i, path in enumerate(paths)}
    settings = XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=512, adapters=adapters, layerwise_scalings=True,
        xlora_dropout_p=0.0,
    )  # fmt: skip
    return {
        "peft one static LoRA": PeftModel.from_pretrained(build(vocabulary), paths[0]).eval(),
        "peft arrow": create_arrow_model(build(vocabulary), paths, ArrowConfig(top_k=2)).eval(),
        "peft xlora": get_peft_model(base, settings).eval(),
    }


def ours(vocabulary: int, paths: list[str], preset: str, layout: str = "stack") -> LlamaForCausalLM:
    model = build(vocabulary)
    load_mixture(model, Mixture(paths, preset, **SETTINGS[preset]), layout=layout)
    if preset == "request":
        model.mixture.set_gate(requests=["expert1"])
    return model


def our_models(vocabulary: int, paths: list[str]) -> dict[str, torch.nn.Module]:
    models = {preset: ours(vocabulary, paths, preset) for preset in SETTINGS}
    models |= {f"{preset}, rows": ours(vocabulary, paths, preset, "rows") for preset in JOINED}
    return models
