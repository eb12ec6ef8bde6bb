"""What gating buys: four text styles, four LoRAs, one small real base model.

Stories are sampled from the base model itself and rewritten in four styles; a LoRA is trained on
each with PEFT; then every way of using the four together is measured by its loss per token, on text
of one style and on text that changes its style every sentence (MeteoRA's claim).

    python benchmarks/quality_mixture.py MODEL WORK [--json FILE]

MODEL is a directory with a small character-level Llama. WORK keeps samples, adapters and mixtures,
so that a second run measures only. One or two CPU cores and half an hour are enough.
"""

import argparse
import json
import random
import re
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

from lora_merge.mixture import Mixture, TrainSettings, load_mixture, train_gate
from lora_merge.mixture.data import Example
from lora_merge.mixture.train import mean_loss

LEAVES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_CIPHER = str.maketrans("abcdefghijklmnopqrstuvwxyz", "nopqrstuvwxyzabcdefghijklm")

STYLES: dict[str, Callable[[str], str]] = {
    "upper": str.upper,
    "reversed": lambda s: " ".join(word[::-1] for word in s.split(" ")),
    "vowelless": lambda s: re.sub(r"(?<=\w)[aeiou]", "", s),
    "cipher": lambda s: s.lower().translate(_CIPHER),
}


def sample_stories(model: Any, tokenizer: Any, count: int, length: int) -> list[str]:
    torch.manual_seed(0)
    stories: list[str] = []
    start = torch.full((50, 1), tokenizer.bos_token_id)
    while len(stories) < count:
        ids = model.generate(
            start, attention_mask=torch.ones_like(start), do_sample=True, temperature=0.8,
            max_new_tokens=length, pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
        stories += tokenizer.batch_decode(ids, skip_special_tokens=True)
    return [" ".join(s.split()) for s in stories[:count]]


def composite(story: str, style: random.Random) -> str:
    """Every sentence in a style of its own, never twice the same in a row."""
    parts, last = [], ""
    for sentence in re.split(r"(?<=[.!?]) ", story):
        last = style.choice([name for name in STYLES if name != last])
        parts.append(STYLES[last](sentence))
    return " ".join(parts)


def examples_of(texts: list[str], tokenizer: Any, expert: int = -1) -> list[Example]:
    rows = (tuple(tokenizer(text)["input_ids"][:160]) for text in texts)
    return [Example(ids, 0, expert) for ids in rows]


def train_lora(base: str, examples: list[Example], folder: Path, steps: int) -> None:
    from peft import LoraConfig, get_peft_model

    from lora_merge.mixture.data import batches

    torch.manual_seed(1)
    config = LoraConfig(r=16, lora_alpha=32, target_modules=LEAVES, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _, batch in zip(range(steps), batches(examples, 8, seed=0), strict=False):
        loss = model(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.labels).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    print(f"  {folder.name}: training loss {float(loss):.3f}", flush=True)
    model.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("work", type=Path)
    parser.add_argument("--stories", type=int, default=1000)
    parser.add_argument("--held", type=int, default=100)
    parser.add_argument("--lora-steps", type=int, default=500)
    parser.add_argument("--gate-steps", type=int, default=200)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    work = options.work
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model).eval()
    stories_file = work / "stories.json"
    if not stories_file.is_file():
        stories = sample_stories(model, tokenizer, options.stories, 220)
        stories_file.write_text(json.dumps(stories))
    stories = json.loads(stories_file.read_text())
    held, train = stories[: options.held], stories[options.held :]
    style = random.Random(0)
    names = list(STYLES)
    training = {
        n: examples_of([STYLES[n](s) for s in train], tokenizer, i) for i, n in enumerate(names)
    }
    tests = {n: examples_of([STYLES[n](s) for s in held], tokenizer) for n in names}
    tests["composite"] = examples_of([composite(s, style) for s in held], tokenizer)
    for name in names:
        if not (work / name / "adapter_model.safetensors").is_file():
            train_lora(options.model, training[name], work / name, options.lora_steps)
    paths = [str(work / name) for name in names]
    # The gate sees a quarter of each style's rows and as many that switch style: mixed use.
    mixed = [row for name in names for row in training[name][:: len(names)]]
    mixed += examples_of([composite(s, style) for s in train[:: len(names)]], tokenizer)

    table: dict[str, dict[str, float]] = {}

    def report(title: str) -> None:
        table[title] = {name: mean_loss(model, rows) for name, rows in tests.items()}
        cells = "  ".join(f"{value:9.4f}" for value in table[title].values())
        print(f"{title:26s}{cells}", flush=True)

    print(f"{'':26s}" + "  ".join(f"{name:>9s}" for name in tests))
    report("base")
    handle = load_mixture(model, Mixture(paths, "constant"))
    for index, name in enumerate(names):
        handle.set_gate(weights=[float(i == index) for i in range(len(names))])
        report(f"adapter {name}")
    table["oracle"] = {n: table[f"adapter {n}"][n] for n in names}
    for total in (1.0, 2.0, 4.0):
        handle.set_gate(weights=[total / len(names)] * len(names))
        report(f"merge, weights sum to {total:g}")
    handle.detach()
    for preset, settings in (("arrow", {"top_k": 2}), ("arrow", {"top_k": 1}), ("spectr", {}),
                             ("sequence", {"top_k": 1})):  # fmt: skip
        handle = load_mixture(model, Mixture(paths, preset, **settings))
        report(f"{preset} top {settings.get('top_k', 'all')}")
        handle.detach()
    for preset, settings, training_settings in (
        ("xlora", {}, {"lr": 5e-3}),
        ("meteora", {"top_k": 2}, {"lr": 5e-3}),
        ("meteora", {"top_k": 2}, {"lr": 2e-2, "task_loss": 1.0}),
        ("smora", {"top_k": 32}, {"lr": 2e-3}),
    ):
        began = time.perf_counter()
        trained = train_gate(
            model,
            Mixture(paths, preset, **settings),
            mixed,
            TrainSettings(steps=options.gate_steps, batch_size=16, **training_settings),
        )
        seconds = time.perf_counter() - began
        with_task = " + task" if "task_loss" in training_settings else ""
        name = preset + with_task.replace(" + ", "-")
        trained.save_pretrained(work / f"mixture-{name}", force=True)
        handle = load_mixture(model, trained)
        report(f"{preset}{with_task}, {seconds:.0f} s")
        handle.detach()
    oracle = table["oracle"]
    print("\nmean over the four styles, relative to the right adapter (oracle)")
    for title, row in table.items():
        ratio = sum(row[n] / oracle[n] for n in names) / len(names) - 1
        print(f"  {title:26s}{100 * ratio:+7.1f} %")
    if options.json:
        options.json.write_text(json.dumps(table, indent=2))


if __name__ == "__main__":
    main()
