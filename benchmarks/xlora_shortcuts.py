"""What X-LoRA's shortcuts cost: loss per token while decoding, and the distance of the weights.

Texts that change their style are fed token by token through the KV cache after a short prompt, as
decoding does, under the exact gate and under each shortcut.

    python benchmarks/xlora_shortcuts.py MODEL WORK [--rows 24]

WORK is the folder that quality_mixture.py left behind.
"""

import argparse
import json
import random
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from quality_mixture import composite, examples_of
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

from lora_merge.mixture.mixture import Mixture
from lora_merge.mixture.runtime.attach import load_mixture
from lora_merge.mixture.training.distill import distill_xlora

PROMPT = 24


@torch.no_grad()
def decoding_loss(model: Any, ids: torch.Tensor) -> tuple[float, float]:
    """(mean loss of the tokens after the prompt, seconds per token)."""
    out = model(ids[:, :PROMPT], use_cache=True)
    cache, losses = out.past_key_values, []
    start = time.perf_counter()
    for place in range(PROMPT, ids.shape[1] - 1):
        out = model(ids[:, place : place + 1], past_key_values=cache, use_cache=True)
        losses.append(torch.nn.functional.cross_entropy(out.logits[:, -1], ids[:, place + 1]))
    seconds = (time.perf_counter() - start) / len(losses)
    return float(torch.stack(losses).mean()), seconds


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("work", type=Path)
    parser.add_argument("--rows", type=int, default=24)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model).eval()
    stories = json.loads((options.work / "stories.json").read_text())
    style = random.Random(3)
    held = examples_of([composite(s, style) for s in stories[: options.rows]], tokenizer)
    seen = examples_of([composite(s, style) for s in stories[100:260]], tokenizer)
    shortest = min(len(e.ids) for e in held)
    ids = torch.tensor([e.ids[:shortest] for e in held])
    mixture = Mixture.from_pretrained(options.work / "mixture-xlora")
    print(f"{len(held)} texts, {PROMPT} + {shortest - PROMPT} tokens")

    def show(title: str) -> None:
        loss, seconds = decoding_loss(model, ids)
        print(f"  {title:24s} loss {loss:.4f}   {1e3 * seconds:6.1f} ms per step", flush=True)

    show("base")
    handle = load_mixture(model, mixture)
    show("exact")
    for after in (1, 16, 64):
        handle.set_gate(freeze_after=after)
        show(f"frozen after {after}")
    handle.set_gate(lagged=True)
    show("lagged")
    handle.detach()
    result = distill_xlora(model, mixture, seen, held=held)
    load_mixture(model, result.mixture)
    show("distilled")
    print(f"  distance of the distilled weights (total variation): {result.error:.3f}")


if __name__ == "__main__":
    main()
