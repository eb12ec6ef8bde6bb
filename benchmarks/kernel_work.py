"""What each row of bench_kernels.py times: candidates on one base model, each a call."""

import argparse
import contextlib
import copy
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from kernel_cases import Case
from llama_shapes import make_adapter
from safetensors.torch import load_file
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import lora_merge
from lora_merge.kernels.gated_stack import dispatch
from lora_merge.kernels.gated_stack.gpu import fused
from lora_merge.mixture.mixture import Mixture
from lora_merge.mixture.runtime.attach import load_mixture

CONTEXT = 512  # tokens before the one that is decoded


@dataclass
class Setting:
    """Where and at what size everything runs."""

    device: torch.device
    dtype: torch.dtype
    config: LlamaConfig
    work: Path
    rounds: int
    small: bool
    compile: bool
    profile_all: bool = False

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Projection → (d_out, d_in)."""
        c = self.config
        kv = c.num_key_value_heads * (c.hidden_size // c.num_attention_heads)
        wide, narrow = c.hidden_size, c.intermediate_size
        return {
            "self_attn.q_proj": (wide, wide), "self_attn.k_proj": (kv, wide),
            "self_attn.v_proj": (kv, wide), "self_attn.o_proj": (wide, wide),
            "mlp.gate_proj": (narrow, wide), "mlp.up_proj": (narrow, wide),
            "mlp.down_proj": (wide, narrow),
        }  # fmt: skip

    def adapters(self, count: int, rank: int) -> list[str]:
        """Adapters on disk; those already there are kept."""
        layers = self.config.num_hidden_layers
        return [
            str(make_adapter(self.work / f"r{rank}-{i:03d}", rank, i, layers, self.shapes))
            for i in range(count)
        ]

    def sync(self) -> None:
        """Wait for the GPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def setting_of(options: argparse.Namespace, work: Path) -> Setting:
    device = torch.device(options.device)
    size: dict[str, int] = {
        "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
        "num_key_value_heads": 8, "num_hidden_layers": options.layers or 32,
        "vocab_size": 1024 if options.layers else 128256,  # or the head would outweigh a few layers
    }  # fmt: skip
    if options.small:
        size = {
            "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 128, "num_hidden_layers": options.layers or 2,
        }  # fmt: skip
    config = LlamaConfig(**size, eos_token_id=None, pad_token_id=0, max_position_embeddings=8192)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    compiled = options.compile and device.type == "cuda"
    return Setting(device, dtype, config, work, options.rounds, options.small, compiled,
                   options.profile_all)  # fmt: skip


def build(setting: Setting) -> LlamaForCausalLM:
    """The base model, made where it runs."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(setting.dtype)
    try:
        with setting.device:
            model = LlamaForCausalLM(setting.config).eval()
    finally:
        torch.set_default_dtype(before)
    return model.requires_grad_(False)


def twin(model: nn.Module, *, share: bool = True) -> Any:
    """A copy of the model, with the same weights in the same memory if it may share them."""
    memo = {id(p): p for p in model.parameters()} if share else {}
    return copy.deepcopy(model, memo)


def attached(base: nn.Module, mixture: Mixture, how: str, *, graph: bool = False) -> Any:
    """The base with a mixture on one implementation; the joined layouts move its weights."""
    layouts = {"rows": "rows", "border": "border", "joined": "rows"}
    layout = layouts.get(how.split()[0], "stack")
    model = twin(base, share=layout == "stack")
    load_mixture(model, mixture, layout=layout, graph=graph)
    return model


def switched_off(base: nn.Module, mixture: Mixture, *, graph: bool = False) -> Any:
    """The base with a mixture that does nothing; with `graph` its steps are recorded."""
    model = attached(base, mixture, "eager", graph=graph)
    model.mixture.set_gate(weights=[0.0] * len(mixture.names))
    return model


def mixture_of(setting: Setting, case: Case) -> Mixture:
    paths = setting.adapters(case.experts, case.rank)
    return Mixture(paths, "meteora", top_k=case.top_k or case.experts)


def tokens(setting: Setting, batch: int, length: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(2)
    ids = torch.randint(1, setting.config.vocab_size, (batch, length), generator=random)
    return ids.to(setting.device)


@contextlib.contextmanager
def forced(how: str) -> Iterator[None]:
    """One implementation inside the block."""
    before = os.environ.get(dispatch.VARIABLE)
    os.environ[dispatch.VARIABLE] = how
    try:
        yield
    finally:
        os.environ.pop(dispatch.VARIABLE)
        if before is not None:
            os.environ[dispatch.VARIABLE] = before


class Context(DynamicCache):
    """A context that stays as long as it is, so that every call decodes the same token."""

    frozen = False

    def update(self, keys: Any, values: Any, layer_idx: int, *rest: Any, **how: Any) -> Any:
        """Keys and values of the context and the new tokens."""
        if not self.frozen:
            return super().update(keys, values, layer_idx, *rest, **how)
        layer = self.layers[layer_idx]
        return torch.cat([layer.keys, keys], 2), torch.cat([layer.values, values], 2)


# -- what is timed --------------------------------------------------------------------------------


def implementations(setting: Setting) -> list[str]:
    refused = fused.refusal(setting.device, setting.dtype)
    return ["eager", "rows", "border", *([] if refused else ["triton", "joined"])]


def one_after_another(call: Callable[[], Any]) -> Callable[[], Any]:
    """Without launches that begin before the one before them has ended."""
    from lora_merge.kernels.gated_stack.gpu import _launch

    def run() -> Any:
        before, _launch.overlaps = _launch.overlaps, lambda device: False
        try:
            return call()
        finally:
            _launch.overlaps = before

    return run


def call_of(setting: Setting, how: str, call: Callable[[], Any]) -> Callable[[], Any]:
    name = how.split()[0]

    def run() -> Any:
        with forced(name if name in dispatch.NAMES else "auto"), torch.no_grad():
            return call()

    return run


def decode(setting: Setting, case: Case) -> dict[str, Callable[[], Any]]:
    """One token for each of `case.tokens` sequences after a context."""
    base, mixture = build(setting), mixture_of(setting, case)
    length = 8 if setting.small else CONTEXT
    prompt, token = tokens(setting, case.tokens, length), tokens(setting, case.tokens, 1)
    position = torch.full_like(token, length)
    context = Context()
    with torch.no_grad():
        base(input_ids=prompt, past_key_values=context, use_cache=True, logits_to_keep=1)
    context.frozen = True

    def ways(model: nn.Module, how: str) -> Callable[[], Any]:
        def call() -> Any:
            return model(
                input_ids=token, past_key_values=context, position_ids=position, use_cache=True,
                logits_to_keep=1,
            )  # fmt: skip

        return call_of(setting, how, call)

    models = {"base": base}
    models |= {how: attached(base, mixture, how) for how in implementations(setting)}
    work = {how: ways(model, how) for how, model in models.items()}
    if "joined" in models and setting.device.type == "cuda":
        late = attached(base, mixture, "joined")
        work["joined no-overlap"] = one_after_another(ways(late, "joined no-overlap"))
    if setting.compile:
        for how in ("base", "eager"):
            compiled = torch.compile(models[how], dynamic=False)
            work[f"{how} compiled"] = ways(compiled, how)
    return work


def prefill(setting: Setting, case: Case) -> dict[str, Callable[[], Any]]:
    """One forward pass over a prompt."""
    base, mixture = build(setting), mixture_of(setting, case)
    ids = tokens(setting, 1, 32 if setting.small else case.tokens)
    ways = implementations(setting)
    if "triton" in ways and case.experts >= 4 * (case.top_k or case.experts):
        ways.append("grouped")
    models = {"base": base} | {how: attached(base, mixture, how) for how in ways}

    def way(model: nn.Module, how: str) -> Callable[[], Any]:
        call = lambda: model(input_ids=ids, use_cache=False, logits_to_keep=1)  # noqa: E731
        return call_of(setting, how, call)

    return {how: way(model, how) for how, model in models.items()}


def generate(setting: Setting, case: Case) -> dict[str, Callable[[], Any]]:
    """Hugging Face's generate, greedy; with `case.steps` every candidate records its steps."""
    base = build(setting)
    paths = setting.adapters(case.experts, case.rank)
    prompt = tokens(setting, 1, 8 if setting.small else CONTEXT)
    new = 4 if setting.small else 128
    steps = case.steps and setting.device.type == "cuda"
    models: dict[str, Any] = {"base": base}
    if case.against == "xlora":
        gate = {"top_k": case.experts} if case.distilled else {}
        kind = "meteora" if case.distilled else "xlora"
        mixture = Mixture(paths, kind, hidden_size=setting.config.hidden_size, **gate)
        models["peft"] = _peft_xlora(setting, base, paths)
    elif case.against == "arrow":
        mixture = Mixture(paths, "arrow", top_k=case.top_k)
        models["peft"] = _peft_arrow(base, paths, case.top_k or 1)
    else:
        mixture = mixture_of(setting, case)
    if steps:
        models["base"] = switched_off(base, mixture, graph=True)
    models |= {how: attached(base, mixture, how, graph=steps) for how in implementations(setting)}

    def way(model: Any, how: str) -> Callable[[], Any]:
        def call() -> Any:
            return model.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                max_new_tokens=new, min_new_tokens=new,
            )  # fmt: skip

        return call_of(setting, how, call)

    return {how: way(model, how) for how, model in models.items()}


def _peft_xlora(setting: Setting, base: nn.Module, paths: list[str]) -> Any:
    from peft import XLoraConfig, get_peft_model

    model = twin(base)
    model.config.use_cache = False
    adapters = {str(i): path for i, path in enumerate(paths)}
    settings = XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=setting.config.hidden_size, adapters=adapters,
        layerwise_scalings=True, xlora_dropout_p=0.0,
    )  # fmt: skip
    return get_peft_model(model, settings).eval()


def _peft_arrow(base: nn.Module, paths: list[str], top_k: int) -> Any:
    from peft import ArrowConfig, create_arrow_model

    return create_arrow_model(twin(base), paths, ArrowConfig(top_k=top_k)).eval()


def inactive(setting: Setting, case: Case) -> dict[str, Callable[[], Any]]:
    """One token through a model whose mixture is switched off."""
    base, mixture, ids = build(setting), mixture_of(setting, case), tokens(setting, 1, 1)
    models = {"base": base, "inactive": switched_off(base, mixture)}

    def way(model: Any, how: str) -> Callable[[], Any]:
        return call_of(setting, how, lambda: model(input_ids=ids, use_cache=False))

    return {how: way(model, how) for how, model in models.items()}


def training(setting: Setting, case: Case) -> dict[str, Callable[[], Any]]:
    """Forward, backward and a step of the optimiser: a gate here, one LoRA there."""
    from peft import LoraConfig, get_peft_model

    base, mixture = build(setting), mixture_of(setting, case)
    base.config.use_cache = False
    ids = tokens(setting, 1 if setting.small else 4, 16 if setting.small else 512)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=case.rank, lora_alpha=case.rank,
        target_modules=[name.rpartition(".")[2] for name in setting.shapes],
    )  # fmt: skip
    models = {"peft": get_peft_model(twin(base), config).train()}
    for how in ("eager", "triton"):
        if how not in implementations(setting):
            continue
        models[how] = attached(base, mixture, how).train()
        models[how].mixture.train_gate_only()

    def way(model: Any, how: str) -> Callable[[], Any]:
        learned = [p for p in model.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(learned, lr=1e-4)

        def call() -> None:
            with forced(how if how in dispatch.NAMES else "auto"):
                model(input_ids=ids, labels=ids).loss.backward()
            optimiser.step()
            optimiser.zero_grad()

        return call

    return {how: way(model, how) for how, model in models.items()}


def cluster(setting: Setting, case: Case) -> dict[str, Callable[[], Any]]:
    """LoRA-LEGO of many adapters against reading their files to the same device."""
    paths = setting.adapters(8 if setting.small else case.experts, case.rank)
    device = str(setting.device)

    def read() -> None:
        for path in paths:
            load_file(Path(path) / "adapter_model.safetensors", device=device)
        setting.sync()

    def merge() -> None:
        lora_merge.merge(paths, method="lego", rank=case.rank, device=device)
        setting.sync()

    return {"base": read, "cluster": merge}


KINDS = {
    "decode": decode, "prefill": prefill, "generate": generate, "inactive": inactive,
    "training": training, "cluster": cluster,
}  # fmt: skip
