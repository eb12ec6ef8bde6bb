"""SMoRA from scratch beside plain LoRAs: one adapter for many tasks, trained on all at once.

SMoRA (arXiv 2501.15103): one LoRA of rank 64, of whose ranks a gate picks 8 for every token. Beside
it a plain LoRA of rank 64, one of rank 8 (as many as SMoRA has at work), and MeteoRA's way: one
expert per task, 64 ranks together, a gate that knows each row's task while it trains.

    python benchmarks/smora.py styles MODEL WORK [--out FILE]
    python benchmarks/smora.py arena ARENA WORK [--out FILE]

"styles" are the four text styles of `quality_mixture.py` (WORK is its folder too), measured by loss
per token. "arena" is a folder with a BERT, five classification tasks and their frozen heads,
measured by accuracy: 480 validation rows of each task train, 120 choose, the first --judged test
rows are reported. All arms see the same rows in the same order. Of several
learning rates of the experts (--rates) each arm has the one that is best on the rows that choose.
"""

import argparse
import json
import random
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quality_mixture import STYLES, composite, in_style, sample_stories
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, logging

from lora_merge import Mixture, fresh_mixture, load_mixture
from lora_merge.mixture.training.data import Example
from lora_merge.mixture.training.loop import mean_loss
from lora_merge.mixture.training.losses import GateLosses
from lora_merge.mixture.training.processes import Processes
from lora_merge.mixture.training.settings import TrainSettings
from lora_merge.mixture.training.train import train_gate

RANKS, ACTIVE, BIAS_RATE = 64, 8, 1e-3
RATES = (3e-3, 1e-2)
SIZES = {"train": 480, "dev": 120}


@dataclass(frozen=True)
class Arm:
    """What is trained: `start` gives its mixture for (base, task names)."""

    title: str
    active: str
    start: Callable[[str, Sequence[str]], Mixture]


def plain(rank: int) -> Arm:
    return Arm(
        f"LoRA, rank {rank}",
        str(rank),
        lambda base, tasks: fresh_mixture(base, rank, "constant", settings={"weights": (1.0,)}),
    )


ARMS = (
    plain(RANKS),
    plain(ACTIVE),
    Arm(
        f"SMoRA, {RANKS} ranks",
        str(ACTIVE),
        lambda base, tasks: fresh_mixture(base, RANKS, "smora", settings={"top_k": ACTIVE}),
    ),
    Arm(
        f"MeteoRA, an expert per task, {RANKS} ranks together, labelled",
        "2 experts",
        lambda base, tasks: fresh_mixture(base, RANKS // len(tasks), "meteora", names=tasks),
    ),
)


def best(
    arm: Arm,
    rates: Sequence[float],
    run: Callable[[float], tuple[float, Any]],
    measured: Callable[[], dict[str, float]],
) -> dict[str, Any]:
    """The run whose rate is best where it chooses (lower is better); only such are measured."""
    lowest, row = float("inf"), {}
    for rate in rates:
        began = time.perf_counter()
        score, handle = run(rate)
        if score < lowest:
            lowest, row = score, {"rate": rate, "active": arm.active, **measured()}
        handle.detach()
        seconds = time.perf_counter() - began
        print(f"  {arm.title}, rate {rate:g}: {score:.4f} ({seconds:.0f} s)", flush=True)
    return row


# -- four styles, a language model -----------------------------------------------------------------


def styles(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    tokenizer = AutoTokenizer.from_pretrained(options.place)
    model = AutoModelForCausalLM.from_pretrained(options.place).eval()
    file = options.work / "stories.json"
    if not file.is_file():
        file.write_text(json.dumps(sample_stories(model, tokenizer, 1000, 220)))
    stories, draw = json.loads(file.read_text()), random.Random(0)
    held, dev, train = stories[:40], stories[90:100], stories[100:]
    rows = {n: [in_style(s, i, tokenizer) for s in held] for i, n in enumerate(STYLES)}
    rows["composite"] = [composite(s, draw, tokenizer) for s in held]
    chooses = [in_style(s, i, tokenizer) for s in dev for i in range(len(STYLES))]
    mixed = [in_style(s, i, tokenizer) for i in range(len(STYLES)) for s in train[i :: len(STYLES)]]
    mixed += [composite(s, draw, tokenizer) for s in train[:: len(STYLES)]]

    def measured() -> dict[str, float]:
        return {name: mean_loss(model, each) for name, each in rows.items()}

    yield "base", {"active": "0", **measured()}
    for arm in ARMS:
        start = arm.start(options.place, list(STYLES))

        def run(rate: float, start: Mixture = start) -> tuple[float, Any]:
            settings = TrainSettings(
                steps=options.steps, train_experts=True, expert_lr=rate,
                bias_rate=BIAS_RATE if start.spec.granularity == "rank" else 0.0,
            )  # fmt: skip
            known = mixed if start.num_experts > 1 else [_unlabelled(row) for row in mixed]
            handle = load_mixture(model, train_gate(model, start, known, settings))
            return mean_loss(model, chooses), handle

        yield arm.title, best(arm, options.rates, run, measured)


def _unlabelled(row: Example) -> Example:
    return replace(row, expert=-1, owners=())


# -- five tasks, a BERT ----------------------------------------------------------------------------


class Arena:
    """Rows, heads and the encoder."""

    def __init__(self, place: str, judged: int) -> None:
        folder, self.judged = Path(place), judged
        self.tasks = list(json.loads((folder / "tasks.json").read_text())["tasks"])
        self.base = str(folder / "base")
        self.model = AutoModel.from_pretrained(self.base, dtype=torch.float32).eval()
        self.model.requires_grad_(False)
        self.heads = {t: load_file(folder / "heads" / f"{t}.safetensors") for t in self.tasks}
        self.rows: dict[tuple[str, str], tuple[Tensor, Tensor, Tensor]] = {}
        for task in self.tasks:
            data = np.load(folder / "data" / f"{task}.npz")
            for split in ("val", "test"):
                names = (f"{split}_{part}" for part in ("ids", "len", "y"))
                self.rows[task, split] = tuple(
                    torch.from_numpy(data[name].astype(np.int64)) for name in names
                )  # type: ignore[assignment]
            order = torch.randperm(600, generator=torch.Generator().manual_seed(0))
            parts = order.split([SIZES["train"], SIZES["dev"]])
            for split, chosen in zip(SIZES, parts, strict=True):
                self.rows[task, split] = tuple(t[chosen] for t in self.rows[task, "val"])  # type: ignore[assignment]

    def logits(self, task: str, ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of rows of one task, and which of their tokens count."""
        ids = ids[:, : int(lengths.max())]
        mask = torch.arange(ids.shape[1])[None] < lengths[:, None]
        states = self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        weights = mask.unsqueeze(-1).to(states.dtype)
        pooled = functional.normalize((states * weights).sum(1) / weights.sum(1), dim=1)
        head = self.heads[task]
        return functional.linear(pooled, head["weight"].float(), head["bias"].float()), mask

    def judge(self, split: str) -> dict[str, tuple[float, float]]:
        """Accuracy and mean loss of every task."""
        found = {}
        for task in self.tasks:
            ids, lengths, labels = (part[: self.judged] for part in self.rows[task, split])
            with torch.no_grad():
                parts = zip(ids.split(200), lengths.split(200), strict=True)
                logits = torch.cat([self.logits(task, *part)[0] for part in parts])
            right = (logits.argmax(-1) == labels).double().mean()
            found[task] = float(right), float(functional.cross_entropy(logits, labels))
        return found

    def train(self, start: Mixture, rate: float, steps: int) -> Any:
        """Train a mixture on all tasks in turn; it stays attached."""
        handle = load_mixture(self.model, start, dtype=torch.float32)
        gate = handle.train_gate_only() if start.spec.is_learned else []
        factors = [p for n, p in handle.groups.named_parameters() if "weight" not in n]
        for factor in factors:
            factor.requires_grad_(True)
        by_rank = start.spec.granularity == "rank"
        peaks = [2e-3 if by_rank else 5e-3, rate]
        optimizer = torch.optim.AdamW(
            [{"params": p, "weight_decay": 0.0} for p in (gate, factors)], lr=rate
        )
        losses, random_ = GateLosses(), torch.Generator().manual_seed(0)
        self.model.train()
        for step in range(steps):
            factor = min((step + 1) / 20, 0.1 + 0.45 * (1 + np.cos(np.pi * step / steps)))
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            number = step % len(self.tasks)
            ids, lengths, labels = self.rows[self.tasks[number], "train"]
            chosen = torch.randint(len(labels), (16,), generator=random_)
            ids, lengths, labels = ids[chosen], lengths[chosen], labels[chosen]
            mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
            losses.begin(mask, torch.full(mask.shape, number))
            with handle.using(observe=losses.observe):
                logits, _ = self.logits(self.tasks[number], ids, lengths)
            loss = functional.cross_entropy(logits, labels)
            named = losses.mean("task") if start.num_experts > 1 else None
            (loss if named is None else loss + named).backward()
            torch.nn.utils.clip_grad_norm_([*gate, *factors], 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if by_rank:
                losses.move_biases(BIAS_RATE, Processes.current())
        self.model.eval()
        return handle


def arena(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    place = Arena(options.place, options.judged)

    def shown() -> dict[str, float]:
        return {task: 100 * right for task, (right, _) in place.judge("test").items()}

    yield "base", {"active": "0", **shown()}
    for arm in ARMS:

        def run(rate: float, arm: Arm = arm) -> tuple[float, Any]:
            handle = place.train(arm.start(place.base, place.tasks), rate, options.steps)
            chooses = -float(np.mean([right for right, _ in place.judge("dev").values()]))
            return chooses, handle

        yield arm.title, best(arm, options.rates, run, shown)


# -- the table -------------------------------------------------------------------------------------


def markdown(options: argparse.Namespace, table: dict[str, dict[str, Any]]) -> str:
    kind, rates = options.kind, " ".join(f"{rate:g}" for rate in options.rates)
    names = [name for name in table["base"] if name != "active"]
    unit = "loss in nats per token, lower is better" if kind == "styles" else "accuracy in %"
    digits = 3 if kind == "styles" else 1
    lines = [
        f"`python benchmarks/smora.py {kind} ... --steps {options.steps} --rates {rates}`: {unit}.",
        "",
        f"| | at work | rate | {' | '.join(names)} | mean |",
        "| - |" + " - |" * (len(names) + 3),
    ]
    for title, row in table.items():
        numbers = [row[name] for name in names]
        cells = [f"{number:.{digits}f}" for number in (*numbers, sum(numbers) / len(numbers))]
        lines.append(f"| {title} | {row['active']} | {row.get('rate', '')} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=["styles", "arena"])
    parser.add_argument("place", help="The model, or the arena's folder.")
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--judged", type=int, default=500, help="Test rows of each task.")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--out", type=Path, help="Markdown file to write.")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    options.work.mkdir(parents=True, exist_ok=True)
    file = options.work / f"smora-{options.kind}-{options.steps}.json"
    table: dict[str, dict[str, Any]] = {}
    for title, row in (styles if options.kind == "styles" else arena)(options):
        table[title] = row
        file.write_text(json.dumps(table, indent=2))
    text = markdown(options, table)
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
