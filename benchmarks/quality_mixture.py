"""What gating buys: four text styles, four LoRAs, one small real base model.

Stories are sampled from the base model itself and rewritten in four styles; a LoRA is trained on
each with PEFT; then every way of using the four together is measured by its loss per token, on text
of one style and on text that changes its style every sentence (MeteoRA's claim).

    python benchmarks/quality_mixture.py MODEL WORK [--out FILE]

MODEL is a directory with a small character-level Llama. WORK keeps samples, adapters and what was
measured, so that a second run goes on. Two CPU cores and an hour are enough.

Three references tell what is possible. The *oracle* runs every token under the adapter of its own
style. A *late oracle* learns a change of style k tokens late, as any gate must that reads the text.
The *ensemble* runs all four adapters apart and weighs their predictions by Bayes' rule.
"""

import argparse
import json
import random
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

from lora_merge import merge
from lora_merge.mixture.mixture import Mixture
from lora_merge.mixture.runtime.attach import load_mixture
from lora_merge.mixture.training.data import Example, in_order
from lora_merge.mixture.training.settings import TrainSettings
from lora_merge.mixture.training.train import train_gate

LENGTH = 160
SETTLED = 8  # tokens after the start or a change of style that the settled loss leaves out
CHANGE = 0.02  # probability of a change of style per token, for the ensemble
SCALES = (0.15, 0.2, 0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0)
MERGES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("task-arithmetic", {}),
    ("ties", {}),
    ("tsv", {}),
    ("iso-c", {}),
    ("wudi", {"side": "output", "ridge": 0.01}),
)
UNTRAINED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("arrow", {"top_k": 2}),
    ("spectr", {}),
    ("sequence", {"top_k": 1}),
    ("hilora", {}),
)
TRAINED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("recall", {}),
    ("meteora", {"memory": 0.9}),
    ("xlora", {"memory": 0.9}),
    ("smora", {"top_k": 32}),
    ("meteora", {}),
    ("xlora", {}),
)
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


def in_style(story: str, style: int, tokenizer: Any) -> Example:
    """A story in one style."""
    text = list(STYLES.values())[style](story)
    return Example(tuple(tokenizer(text)["input_ids"][:LENGTH]), 0, style)


def composite(story: str, draw: random.Random, tokenizer: Any) -> Example:
    """Every sentence in a style of its own, never twice the same in a row."""
    ids: list[int] = []
    owners: list[int] = []
    last = -1
    for number, sentence in enumerate(re.split(r"(?<=[.!?]) ", story)):
        last = draw.choice([style for style in range(len(STYLES)) if style != last])
        text = list(STYLES.values())[last](sentence) + " "
        part = tokenizer(text, add_special_tokens=number == 0)["input_ids"]
        ids += part
        owners += [last] * len(part)
    return Example(tuple(ids[:LENGTH]), 0, -1, tuple(owners[:LENGTH]))


def train_lora(base: str, examples: list[Example], folder: Path, steps: int) -> None:
    from peft import LoraConfig, get_peft_model

    from lora_merge.mixture.training.data import batches

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


class Bench:
    """The base model, the rows it is measured on, and the table so far."""

    def __init__(self, model: Any, rows: Mapping[str, list[Example]], file: Path) -> None:
        self.model, self.rows, self.file = model, rows, file
        self.table: dict[str, dict[str, float]] = (
            json.loads(file.read_text()) if file.is_file() else {}
        )

    def losses(self, rows: list[Example]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Of every row: loss (S,), owner and tokens since a change, of each predicted token."""
        for batch in in_order(rows, 20):
            with torch.no_grad():
                logits = self.model(batch.ids, attention_mask=batch.mask).logits[:, :-1]
            every = torch.log_softmax(logits, -1).gather(-1, batch.ids[:, 1:, None])[..., 0]
            for row, mask, owners in zip(every, batch.mask, batch.owners, strict=True):
                size = int(mask.sum())
                yield -row[: size - 1], owners[1:size], since_change(owners[:size])[1:]

    def measure(self, title: str) -> None:
        """Put a row into the table: whatever is attached to the model now."""
        began = time.perf_counter()
        self.add(title, {name: list(self.losses(rows)) for name, rows in self.rows.items()})
        print(f"  ({time.perf_counter() - began:.0f} s)", flush=True)

    def add(self, title: str, found: Mapping[str, list[tuple[Tensor, Tensor, Tensor]]]) -> None:
        """Put a row into the table: losses by text as `losses` gives them."""
        row = {}
        for name, parts in found.items():
            loss, _, age = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
            row[name], row[f"{name} settled"] = (
                float(loss.mean()), float(loss[age >= SETTLED].mean())
            )  # fmt: skip
        self.table[title] = row
        self.file.write_text(json.dumps(self.table, indent=2))
        print(f"{title:44s}" + " ".join(f"{row[name]:8.4f}" for name in self.rows), end="")


def since_change(owners: Tensor) -> Tensor:
    """Tokens since the text began or its style changed, shape (S,)."""
    ages, age = [], -1
    for place, owner in enumerate(owners.tolist()):
        age = 0 if place and owner != owners[place - 1] else age + 1
        ages.append(age)
    return torch.tensor(ages)


def late_weights(owners: Tensor, delay: int, count: int) -> Tensor:
    """One-hot weights that follow a change of style after `delay` tokens, shape (S, count)."""
    weights = torch.full((len(owners), count), 1.0 / count)
    ages = since_change(owners)
    before = -1
    for place, owner in enumerate(owners.tolist()):
        if place and ages[place] == 0:
            before = int(owners[place - 1])
        acting = owner if ages[place] >= delay else before
        if acting >= 0:
            weights[place] = torch.nn.functional.one_hot(torch.tensor(acting), count)
    return weights


def oracles(bench: Bench, paths: list[str]) -> None:
    """The oracle and the late ones: weights given from outside, token by token."""
    handle = load_mixture(bench.model, Mixture(paths, "recall"))
    driver = handle.two_pass
    assert driver is not None
    for delay in (0, 1, 2, 4):
        found = {}
        for name, rows in bench.rows.items():
            found[name] = []
            for row in rows:
                owners = torch.tensor(row.owners or (row.expert,) * len(row.ids))
                weights = late_weights(owners, delay, len(paths))
                driver._weights = lambda *_, weights=weights: weights  # type: ignore[method-assign]
                found[name] += list(bench.losses([row]))
        bench.add(
            "oracle" if delay == 0 else f"oracle, {delay} token{'s' * (delay > 1)} late", found
        )
        print(flush=True)
    handle.detach()


def ensemble(bench: Bench, paths: list[str]) -> None:
    """Four passes, predictions weighed by the posterior of the style."""
    handle = load_mixture(bench.model, Mixture(paths, "constant"))
    runs = []
    for index in range(len(paths)):
        handle.set_gate(weights=[float(i == index) for i in range(len(paths))])
        runs.append({name: list(bench.losses(rows)) for name, rows in bench.rows.items()})
    handle.detach()
    found = {}
    for name in bench.rows:
        found[name] = []
        for parts in zip(*(run[name] for run in runs), strict=True):
            likelihood = -torch.stack([loss for loss, _, _ in parts], dim=1)
            posterior = torch.full((len(paths),), 1 / len(paths))
            total = torch.zeros(len(likelihood))
            for place, row in enumerate(likelihood):
                joint = posterior.log() + row
                total[place] = -torch.logsumexp(joint, 0)
                posterior = torch.softmax(joint, 0)
                others = (1 - posterior) / (len(paths) - 1)
                posterior = (1 - CHANGE) * posterior + CHANGE * others
            found[name].append((total, *parts[0][1:]))
    bench.add("ensemble of four passes (Bayes)", found)
    print(flush=True)


def merges(bench: Bench, paths: list[str], validation: list[Example]) -> None:
    """Every merge at the scale that is best on the validation rows."""
    for method, parameters in MERGES:
        adapter = merge(paths, method=method, rank=64, parameters=parameters)
        handle = load_mixture(bench.model, Mixture([adapter], "constant", weights=(1.0,)))
        best = (float("inf"), 1.0)
        for scale in SCALES:
            handle.set_gate(weights=[scale])
            loss = torch.cat([x for x, _, _ in bench.losses(validation)]).mean()
            best = min(best, (float(loss), scale))
        handle.set_gate(weights=[best[1]])
        bench.measure(f"merge: {method}, scale {best[1]:g}")
        handle.detach()


def gates(bench: Bench, paths: list[str], rows: list[Example], settings: TrainSettings) -> None:
    """Gates without training, then trained ones with `train`'s own defaults."""
    for preset, chosen in UNTRAINED:
        handle = load_mixture(bench.model, Mixture(paths, preset, **chosen))
        bench.measure(called(preset, chosen))
        handle.detach()
    for preset, chosen in TRAINED:
        title = f"{called(preset, chosen)}, trained"
        if title in bench.table:
            continue
        began = time.perf_counter()
        trained = train_gate(bench.model, Mixture(paths, preset, **chosen), rows, settings)
        seconds = time.perf_counter() - began
        handle = load_mixture(bench.model, trained)
        bench.measure(title)
        handle.detach()
        print(f"    trained in {seconds:.0f} s", flush=True)


def called(preset: str, chosen: Mapping[str, Any]) -> str:
    return ", ".join([preset, *(f"{k.replace('_', ' ')} {v:g}" for k, v in chosen.items())])


def markdown(bench: Bench, options: argparse.Namespace) -> str:
    """The table, with the mean over styles beside the oracle's."""
    names, oracle = list(STYLES), bench.table["oracle"]
    lines = [
        "# Gates on four text styles",
        "",
        f"`python benchmarks/quality_mixture.py MODEL WORK --measure {options.measure} "
        f"--lora-steps {options.lora_steps} --gate-steps {options.gate_steps}`",
        "",
        "Loss in nats per token; lower is better. Styles: the mean of loss over the oracle's, less "
        f"1. Settled: without the first {SETTLED} tokens of a text and after a change of style, "
        "where no gate that reads the text can know it.",
        "",
        f"| | {' | '.join(names)} | styles | settled | composite | settled |",
        "| - |" + " - |" * (len(names) + 4),
    ]
    for title, row in bench.table.items():
        cells = [f"{row[name]:.3f}" for name in names]
        for tail in ("", " settled"):
            excess = sum(row[n + tail] / oracle[n + tail] for n in names) / len(names) - 1
            cells.append(f"{100 * excess:+.1f} %")
        cells += [f"{row['composite']:.3f}", f"{row['composite settled']:.3f}"]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("work", type=Path)
    parser.add_argument("--stories", type=int, default=1000)
    parser.add_argument("--held", type=int, default=90, help="Stories that nothing trains on.")
    parser.add_argument("--measure", type=int, default=40, help="How many of them are measured.")
    parser.add_argument("--lora-steps", type=int, default=500)
    parser.add_argument("--gate-steps", type=int, default=200)
    parser.add_argument("--out", type=Path, help="Markdown file to write.")
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
    held, tuning = stories[: options.held], stories[options.held : options.held + 10]
    train = stories[options.held + 10 :]
    held = held[: options.measure]
    draw, names = random.Random(0), list(STYLES)
    rows = {
        name: [in_style(story, style, tokenizer) for story in held]
        for style, name in enumerate(names)
    }
    rows["composite"] = [composite(story, draw, tokenizer) for story in held]
    validation = [in_style(s, i % len(names), tokenizer) for i, s in enumerate(tuning * 2)]
    validation += [composite(story, draw, tokenizer) for story in tuning[:5]]
    for style, name in enumerate(names):
        if not (work / name / "adapter_model.safetensors").is_file():
            texts = [in_style(story, style, tokenizer) for story in train]
            train_lora(options.model, texts, work / name, options.lora_steps)
    paths = [str(work / name) for name in names]
    # The gate sees a quarter of each style's rows and as many that switch style: mixed use.
    mixed = [in_style(s, i, tokenizer) for i in range(len(names)) for s in train[i :: len(names)]]
    mixed += [composite(story, draw, tokenizer) for story in train[:: len(names)]]

    bench = Bench(model, rows, work / "measured.json")
    if "base" not in bench.table:
        bench.measure("base")
        oracles(bench, paths)
        ensemble(bench, paths)
    if not any(title.startswith("merge") for title in bench.table):
        merges(bench, paths, validation)
    gates(bench, paths, mixed, TrainSettings(steps=options.gate_steps))
    if options.out:
        options.out.write_text(markdown(bench, options), encoding="utf-8")
    print(markdown(bench, options))


if __name__ == "__main__":
    main()
