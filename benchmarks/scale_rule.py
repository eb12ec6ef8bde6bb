"""What the rule of `scale: auto` was made from: scores of merges of subsets, over scales.

    python benchmarks/scale_rule.py ARENA --out benchmarks/results/scale_rule.json

Subsets of two to five of an arena's tasks, several methods, five scales each; validation rows alone
(64 per task, cut to 32 tokens), accuracy smoothed as in quality.py over that of the task's own
adapter. Beside the scores stands what the rule sees: the adapters' norms, and those of their sum
and of the merge. tests/merge/test_advice.py holds the rule and the advice of `compare` to these
numbers. Rows that the file has already are kept.
"""

import argparse
import json
from itertools import combinations
from pathlib import Path
from typing import Any

import quality
import torch

import lora_merge
from lora_merge.adapters.alignment import align, read_stacks

METHODS = (
    ("svd", "full"),
    ("wudi-iso", 16),
    ("svd", 16),
    ("wudi-iso", "full"),
    ("tsv", "full"),
    ("ties", 16),
)
# Of each size, the subsets that were measured, by their place among all.
SUBSETS = {2: (0, 4, 5, 8, 9), 3: (1, 5, 8), 4: (0, 3), 5: (0,)}
FACTORS = (0.62, 0.8, 1.0, 1.28, 1.6)
ROWS, TOKENS = 64, 32


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("arena", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arena = quality._arena(arguments.arena, [])
    rows = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
    done = {(row["method"], str(row["rank"]), tuple(row["tasks"])) for row in rows}
    tasks = list(arena.tasks)
    for method, rank in METHODS:
        for size, places in SUBSETS.items():
            every = list(combinations(tasks, size))
            for subset in (every[place] for place in places):
                if (method, str(rank), subset) not in done:
                    arena.tasks = list(subset)
                    rows.append(_measure(arena, arguments.arena, method, rank))
                    text = ",\n".join(json.dumps(row) for row in rows)
                    arguments.out.write_text(f"[\n{text}\n]\n")


def _measure(arena: Any, folder: Path, method: str, rank: Any) -> dict[str, Any]:
    folders = [folder / "adapters" / task for task in arena.tasks]
    merged = lora_merge.merge(folders, method=method, rank=rank, dtype="float32", jobs=1, scale=1.0)
    alignment = align([merged])
    deltas = {
        module.name.removeprefix("bert."): next(read_stacks(alignment, module)).delta()
        for module in alignment.modules
    }
    one, total, result = _norms(folders, deltas)
    start = len(folders) ** -0.3 * (total / result if method == "ties" else 1.0)
    return {
        "method": method,
        "rank": rank,
        "tasks": arena.tasks,
        "norms": one,
        "sum": total,
        "merged": result,
        "scores": [[start * f, _score(arena, deltas, start * f)] for f in FACTORS],
    }


def _norms(folders: list[Path], deltas: dict[str, Any]) -> tuple[list[float], float, float]:
    """Norms of the adapters, of their sum and of the merge, over all modules."""
    alignment = align([lora_merge.Adapter.from_pretrained(folder) for folder in folders])
    products = sum(
        next(read_stacks(alignment, module)).adapter_products() for module in alignment.modules
    )
    result = sum(delta.double().square().sum() for delta in deltas.values())
    norms = products.diagonal().sqrt().tolist()
    return norms, float(products.sum().sqrt()), float(result.sqrt())


@torch.no_grad()
def _score(arena: Any, deltas: dict[str, Any], scale: float) -> float:
    own = arena.index["individual"]["val"]
    arena.bert.set_delta(deltas, scale)
    shares = []
    for task in arena.tasks:
        ids, lengths, labels = arena._split(task, "val", ROWS)
        lengths, head = lengths.clamp_max(TOKENS), arena.head[task]
        with torch.autocast("cpu", torch.bfloat16):
            states = arena.bert.features(ids[:, : int(lengths.max())], lengths).float()
        logits = states @ head["weight"].T + head["bias"]
        true = logits.gather(1, labels[:, None])[:, 0]
        others = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
        shares.append(float(torch.sigmoid(2 * (true - others)).mean()) / own[task])
    return sum(shares) / len(shares)


if __name__ == "__main__":
    main()
