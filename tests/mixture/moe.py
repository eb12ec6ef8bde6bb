"""Tiny MoE models, PEFT adapters of their experts and routers, and a loop over all of it."""

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from loop import Loop
from tiny import VOCABULARY
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from lora_merge.mixture.mixture import Mixture

COMMON = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": None,
    "pad_token_id": 0, "initializer_range": 0.2, "num_experts_per_tok": 2,
}  # fmt: skip
MOE: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "moe_intermediate_size": 16, "intermediate_size": 48, "num_experts": 4,
        "norm_topk_prob": True,
    },
    "mixtral": {"intermediate_size": 16, "num_local_experts": 4},
    "olmoe": {"intermediate_size": 16, "num_experts": 4},
    "gpt_oss": {
        "intermediate_size": 16, "num_local_experts": 4, "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}  # fmt: skip
ROUTER = {"gpt_oss": "mlp.router"}
PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@cache
def moe(kind: str) -> Any:
    """A model in float64 whose padding looks like any other token."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **COMMON, **MOE[kind])
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():  # stacks and biases, which start at zero, too
            if parameter.dim() != 1 or not parameter.any():
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return fit_for_float64(model.double())


def fit_for_float64(model: Any) -> Any:
    model.set_experts_implementation("eager")  # the fast ones know no float64
    return model


def adapters(kind: str, folder: Path, count: int = 3) -> list[str]:
    """What PEFT saves of adapters on experts, routers and attention; ranks differ."""
    from peft import LoraConfig, get_peft_model

    paths = []
    for number in range(count):
        config = LoraConfig(
            r=2 + number, lora_alpha=5 + number, target_modules=["q_proj", "v_proj"],
            target_parameters=[*PARAMETERS, f"{ROUTER.get(kind, 'mlp.gate')}.weight"],
        )  # fmt: skip
        model = get_peft_model(copy.deepcopy(moe(kind)).float(), config)
        torch.manual_seed(50 + number)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(0.4 * torch.randn_like(parameter))
        model.save_pretrained(folder / f"expert{number}")
        paths.append(str(folder / f"expert{number}"))
    return paths


class MoeLoop(Loop):
    """The loop, also over the experts that a router has chosen for each token."""

    kind: str

    def __init__(self, kind: str, model: Any, base: Any, mixture: Mixture) -> None:
        self.kind = kind
        super().__init__(model, base, mixture)

    def attach(self, model: Any) -> None:
        modules = {module.name: list(module.specs) for module in self.mixture.alignment.modules}
        for layer, block in enumerate(model.model.layers):
            stem, router = f"model.layers.{layer}.mlp.experts", ROUTER.get(self.kind, "mlp.gate")
            block.mlp.experts.forward = self.experts(block.mlp.experts, stem, modules)
            name = f"model.layers.{layer}.{router}"
            chosen = block.get_submodule(router)
            chosen.forward = self.router(chosen, name, modules.get(name))
        for name, present in modules.items():
            target = None if ".experts." in name else model.get_submodule(name)
            if isinstance(target, nn.Linear):
                target.register_forward_hook(self.hook(name, present))

    def added(self, name: str, present: list[int], x: Tensor, token: int) -> Tensor:
        """What the mixture adds to a module for one token (d,), number `token` of the call."""
        row, place = divmod(token, self.length)
        if self.mixture.spec.signal != "hidden":
            return self.row(name, present, x[None], row)[0]
        weights = self.of_hidden(name, row)[place, present]
        return self.weighted(name, present, x[None], weights[None])[0]

    @property
    def length(self) -> int:
        given = self.inputs.get("input_ids")
        return (self.inputs["inputs_embeds"] if given is None else given).shape[1]

    def experts(
        self, module: Any, stem: str, modules: dict[str, list[int]]
    ) -> Callable[..., Tensor]:
        def project(leaf: str, e: int, x: Tensor, token: int) -> Tensor:
            weight, bias = getattr(module, leaf)[e], getattr(module, f"{leaf}_bias", None)
            y = linear(x, weight.T if self.kind == "gpt_oss" else weight)
            y = y if bias is None else y + bias[e]
            name = f"{stem}.{e}.{leaf}"
            if name in modules:
                return y + self.added(name, modules[name], x, token)
            if leaf == "gate_up_proj":
                for half, old in enumerate(("gate_proj", "up_proj")):
                    name = f"{stem}.{e}.{old}"
                    if name not in modules:
                        continue
                    part = self.added(name, modules[name], x, token)
                    y = y + nn.functional.pad(part, (16 * half, 16 - 16 * half))
            return y

        def run(hidden: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
            out = []
            for token, x in enumerate(hidden):
                total = torch.zeros(())
                for e, share in zip(chosen[token].tolist(), shares[token], strict=True):
                    both = project("gate_up_proj", e, x, token)
                    total = total + share * project("down_proj", e, self.act(both), token)
                out.append(total)
            return torch.stack(out)

        return run

    def act(self, both: Tensor) -> Tensor:
        if self.kind != "gpt_oss":
            return silu(both[:16]) * both[16:]
        gate, up = both[::2].clamp(max=7.0), both[1::2].clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)

    def router(self, module: Any, name: str, present: list[int] | None) -> Callable[..., Any]:
        def run(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logits = hidden @ module.weight.T + getattr(module, "bias", 0.0)
            if present is not None:
                rows = [self.added(name, present, x, t) for t, x in enumerate(hidden)]
                logits = logits + torch.stack(rows)
            if self.kind == "gpt_oss":
                top, chosen = logits.topk(2, dim=-1)
                return logits, top.softmax(-1), chosen
            top, chosen = logits.softmax(-1).topk(2, dim=-1)
            if self.kind != "olmoe":
                top = top / top.sum(-1, keepdim=True)
            return logits, top, chosen

        return run
