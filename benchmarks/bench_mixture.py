"""Speed of gated mixtures beside PEFT's, as ratios to the base model in one run.

A Llama of 8 layers, hidden 512, four r = 16 adapters on seven projections, random weights. Every
candidate runs in turn, round after round, so that a busy machine slows all of them alike. Two
ratios are printed: of medians, and of the fastest rounds, which a busy machine disturbs least.

    python benchmarks/bench_mixture.py [--new-tokens 64] [--rounds 5] [--json FILE]
"""

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, logging

from lora_merge.mixture import Mixture, load_mixture

LEAVES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PROMPT, EXPERTS, RANK = 128, 4, 16


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


def our_models(vocabulary: int, paths: list[str]) -> dict[str, torch.nn.Module]:
    models = {}
    wanted = {
        "constant": {}, "request": {}, "arrow": {"top_k": 2}, "spectr": {}, "meteora": {},
        "smora": {"top_k": 16}, "sequence": {"top_k": 2}, "xlora": {},
    }  # fmt: skip
    for preset, settings in wanted.items():
        model = build(vocabulary)
        load_mixture(model, Mixture(paths, preset, **settings))
        if preset == "request":
            model.mixture.set_gate(requests=["expert1"])
        models[preset] = model
    return models


def measure(
    models: dict[str, torch.nn.Module], work: Callable[[torch.nn.Module], object], rounds: int
) -> dict[str, list[float]]:
    """Seconds of every round of each, rounds interleaved, after one warm-up."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(rounds + 1):
        for name, model in models.items():
            if turn and name == "peft xlora" and turn > max(2, rounds // 3):
                continue  # an order of magnitude slower; fewer rounds tell enough
            start = time.perf_counter()
            work(model)
            if turn:
                times[name].append(time.perf_counter() - start)
    return times


def training_step(model: torch.nn.Module, ids: torch.Tensor) -> None:
    model.train()
    if hasattr(model, "mixture") or hasattr(model, "peft_config"):
        loss = model(input_ids=ids, labels=ids).loss
    else:  # the base with a gradient through every layer: what no gate can be trained below
        inputs = model.get_input_embeddings()(ids).detach().requires_grad_(True)
        loss = model(inputs_embeds=inputs, labels=ids).loss
    loss.backward()
    for parameter in model.parameters():
        parameter.grad = None
    model.eval()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    random = torch.Generator().manual_seed(2)

    def ids(batch: int, length: int) -> torch.Tensor:
        return torch.randint(1, options.vocabulary, (batch, length), generator=random)

    with tempfile.TemporaryDirectory() as folder:
        base = build(options.vocabulary)
        paths = save_experts(base, Path(folder))
        models = {"base": base, **peft_models(options.vocabulary, paths)}
        models |= our_models(options.vocabulary, paths)
        prompt, long = ids(1, PROMPT), ids(1, 512)

        @torch.no_grad()
        def generate(model: torch.nn.Module) -> object:
            return model.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                max_new_tokens=options.new_tokens, min_new_tokens=options.new_tokens,
            )  # fmt: skip

        @torch.no_grad()
        def forward(model: torch.nn.Module) -> object:
            return model(input_ids=long)

        results = {
            f"generate {PROMPT} + {options.new_tokens}": measure(models, generate, options.rounds),
            "forward 512": measure(models, forward, options.rounds),
        }
        batch = ids(4, PROMPT)
        wanted = ("base", "peft xlora", "xlora", "meteora", "smora")
        trained = {name: models[name] for name in wanted}
        for name, model in trained.items():
            if name == "base":
                model.requires_grad_(False)
                model.config.use_cache = False
                continue
            if name.startswith("peft"):
                model.base_model.internal_xlora_classifier.requires_grad_(True)
                base_model = model.base_model.lora_model.model
                base_model.config.use_cache = False
            else:
                model.requires_grad_(False)
                model.config.use_cache = False
                model.mixture.train_gate_only()
        results["training step 4 x 128"] = measure(
            trained, lambda m: training_step(m, batch), options.rounds
        )
    for title, seconds in results.items():
        print(f"\n{title:24s} median ms    x base   fastest x base")
        base_times = seconds["base"]
        for name, values in seconds.items():
            middle = statistics.median(values)
            ratio = middle / statistics.median(base_times)
            best = min(values) / min(base_times)
            print(f"  {name:22s} {middle * 1e3:9.1f} {ratio:9.2f} {best:12.2f}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
