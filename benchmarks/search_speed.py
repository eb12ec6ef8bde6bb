"""What a trial of a search costs, beside its evaluation and beside PEFT's way of merging.

    python benchmarks/search_speed.py ARENA --out benchmarks/results/search_speed.md
        [--rows 64] [--trials 3] [--rank 16]

On the arena of quality.py: a trial is a merge at other weights, put into the loaded model, scored
on the validation rows of every task and taken out again. Timed in turn, in one run: the evaluation
alone; our trial; PEFT's `add_weighted_adapter` (svd) with `set_adapter`, the same evaluation and
`delete_adapter`. The ratio of trials falls as rows grow: the evaluation is the same on both sides.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import quality
import torch
import torch.nn.functional as F
from torch import nn

import lora_merge
from lora_merge.evaluation.applied import applied
from lora_merge.merge.plan import plan_merge
from lora_merge.merge.recipe.recipe import AdapterItem, Recipe
from lora_merge.merge.run import PlannedMerge

METHODS = ("svd", "wudi-iso")
SCALE = 0.6
ALONE, PEFT = "the evaluation alone", "PEFT: add_weighted_adapter (svd), then the evaluation"
Weights = list[float]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("arena", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=64, help="validation rows per task")
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--rank", type=int, default=16)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arena = quality._arena(arguments.arena, [])
    ways = _ways(arena, arguments)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for trial in range(arguments.trials):
        weights = [1.0 + 0.05 * ((trial + i) % 5) for i in range(len(arena.tasks))]
        for name, way in ways.items():
            start = time.process_time()
            way(weights)
            times[name].append(time.process_time() - start)
    _write(arguments, times)


def _ways(arena: Any, arguments: argparse.Namespace) -> dict[str, Callable[[Weights], None]]:
    """What is timed, each a function of the adapters' weights."""
    folders = [arguments.arena / "adapters" / task for task in arena.tasks]
    plain = _plain(arguments.arena)
    adapters = lora_merge.open_adapters(folders)
    model, theirs = _peft(arguments.arena, folders)

    def score(of: nn.Module) -> None:
        _score(arena, of, arguments.rows)

    def ours(method: str, weights: Weights) -> None:
        pairs = zip(adapters, weights, strict=True)
        items = tuple(AdapterItem(adapter.name, weight) for adapter, weight in pairs)
        recipe = Recipe(merge_method=method, adapters=items, rank=arguments.rank, scale=SCALE)
        with applied(plain, PlannedMerge(plan_merge(recipe, adapters)).run(jobs=1)):
            score(plain)

    def peft(weights: Weights) -> None:
        theirs.add_weighted_adapter(
            [folder.name for folder in folders],
            [SCALE * weight for weight in weights],
            "merged",
            combination_type="svd",
            svd_rank=arguments.rank,
        )
        theirs.set_adapter("merged")
        score(model)
        theirs.delete_adapter("merged")

    trials = {f"a trial: {m}, then the evaluation": partial(ours, m) for m in METHODS}
    return {ALONE: lambda _: score(plain), **trials, PEFT: peft}


def _plain(arena: Path) -> nn.Module:
    from transformers import AutoModel

    model: nn.Module = AutoModel.from_pretrained(arena / "base", dtype=torch.float32).eval()
    return model


def _peft(arena: Path, folders: list[Path]) -> tuple[nn.Module, Any]:
    from peft import PeftModel
    from transformers import AutoModel

    model = AutoModel.from_pretrained(arena / "base", dtype=torch.float32)
    first, *others = folders
    loaded: Any = PeftModel.from_pretrained(model, str(first), adapter_name=first.name)
    for folder in others:
        loaded.load_adapter(str(folder), adapter_name=folder.name)
    return loaded.eval(), loaded


@torch.no_grad()
def _score(arena: Any, model: nn.Module, rows: int) -> float:
    """Mean accuracy on the validation rows of every task, each with its own head."""
    hits = []
    for task in arena.tasks:
        ids, lengths, labels = arena._split(task, "val", rows)
        width = int(lengths.max())
        mask = (torch.arange(width)[None] < lengths[:, None]).long()
        states = model(input_ids=ids[:, :width], attention_mask=mask).last_hidden_state
        kept = mask[:, :, None].to(states.dtype)
        x = F.normalize((states * kept).sum(1) / kept.sum(1), dim=1)
        head = arena.head[task]
        found = F.linear(x, head["weight"], head["bias"]).argmax(1)
        hits.append(float((found == labels).double().mean()))
    return sum(hits) / len(hits)


def _write(arguments: argparse.Namespace, times: dict[str, list[float]]) -> None:
    middle = {name: statistics.median(found) for name, found in times.items()}
    alone, peft = middle[ALONE], middle[PEFT]
    lines = [
        "# What a trial of a search costs",
        "",
        f"`python benchmarks/search_speed.py ARENA --out benchmarks/results/search_speed.md "
        f"--rows {arguments.rows} --trials {arguments.trials} --rank {arguments.rank}`:",
        f"five adapters of one encoder, {arguments.rows} rows of each of five tasks, rank "
        f"{arguments.rank}, medians of {arguments.trials} taken in turn, processor time, 1 thread.",
        "",
        "| | over the evaluation alone | trials in the time of one of PEFT's |",
        "| --- | --- | --- |",
    ]
    lines += [f"| {n} | {t / alone:.2f} x | {peft / t:.2f} |" for n, t in middle.items()]
    merging = ", ".join(f"{n.split(', ')[0]} {t - alone:.1f} s" for n, t in middle.items())
    lines += ["", f"A merge that cost nothing would give {peft / alone:.2f} trials. Beyond the"]
    lines += [f"evaluation: {merging}."]
    arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
