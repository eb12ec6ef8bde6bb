"""PEFT's own X-LoRA over the tiny Llama, and our mixture with the same classifier."""

import torch
from tiny import llama

from lora_merge.mixture.mixture import Mixture


def peft_xlora(paths: list[str], **config: object) -> torch.nn.Module:
    from peft import XLoraConfig, get_peft_model

    base = llama()
    base.config.use_cache = False
    settings = XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=32,
        adapters={str(i): path for i, path in enumerate(paths)},
        xlora_dropout_p=0.0,
        **config,
    )
    return get_peft_model(base, settings).eval()


def ours_from(theirs: torch.nn.Module, paths: list[str], **settings: object) -> Mixture:
    """The same classifier: PEFT numbers layers as it walks the model, we number them by name."""
    from peft.tuners import lora

    walked = [
        name.removeprefix("base_model.lora_model.model.")
        for name, m in theirs.named_modules()
        if isinstance(m, lora.Linear)
    ]
    mixture = Mixture(paths, "xlora", **settings)
    linears = [
        m
        for m in theirs.base_model.internal_xlora_classifier.layers
        if isinstance(m, torch.nn.Linear)
    ]
    torch.manual_seed(3)
    for index, linear in enumerate(linears):
        with torch.no_grad():  # far from the start, so that the gate says something
            linear.weight.copy_(torch.randn_like(linear.weight) * 2)
            linear.bias.copy_(torch.randn_like(linear.bias))
        weight, bias = linear.weight.detach(), linear.bias.detach()
        if index == len(linears) - 1 and mixture.spec.granularity == "module":
            order = [walked.index(name) for name in mixture.modules]
            weight = weight.view(len(walked), len(paths), -1)[order].flatten(0, 1)
            bias = bias.view(len(walked), -1)[order].flatten()
        mixture.gate[f"classifier.{index}.weight"] = weight.clone()
        mixture.gate[f"classifier.{index}.bias"] = bias.clone()
    return mixture
