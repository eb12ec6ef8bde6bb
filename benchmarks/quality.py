"""Score merge methods on an arena of tasks: a folder with adapters, heads, data and evaluate.py.

    python benchmarks/quality.py ARENA [--out quality.md] [--only wudi] [--ranks 16] [--val 300]

For every method and rank: merge at scale 1, choose the scale on the validation split alone (a walk
on a geometric grid), score once on the test split. The table gives the mean over tasks of accuracy
over that of the task's own adapter.
"""

import argparse
import importlib.util
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import lora_merge
from lora_merge.adapters import align, read_stacks

# Scales are START * STEP**k.
START, STEP = 0.65, 1.25


@dataclass(frozen=True)
class Entry:
    """One row: a method with its parameters."""

    method: str
    parameters: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    ranks: tuple[int | str, ...] = (16, 32, "full")

    @property
    def label(self) -> str:
        """Method and what differs from its defaults."""
        extras = {**self.parameters, **self.settings}
        return " ".join([self.method, *(f"{k}={v}" for k, v in extras.items())])


ENTRIES = (
    Entry("wudi", {"side": "output", "ridge": 0.01}),
    Entry("wudi", {"side": "output"}),
    Entry("ctm", ranks=(16, 32)),
    Entry("wudi", {"side": "input"}, ranks=(16, "full")),
    Entry("wudi", {"side": "output", "ridge": 0.01, "compress": "frobenius"}, ranks=(16,)),
    Entry("wudi", {"side": "both"}, ranks=(16, "full")),
    Entry("tsv"),
    Entry("iso-c"),
    Entry("iso-cts"),
    Entry("task-arithmetic"),
    Entry("ctm", {"inner": "iso-c"}, ranks=(16, 32)),
    Entry("wudi", {"side": "output"}, {"pico": True}, ranks=(16,)),
    Entry("task-arithmetic", {}, {"svc": True}, ranks=(16,)),
    Entry("knots-ties", {"density": 0.3}, ranks=(16, 32)),
    Entry("core-ties", {"density": 0.3}, ranks=(16, 32)),
    Entry("ties", ranks=(16, 32)),
    Entry("dare", ranks=(16, 32)),
    Entry("lego", {"balance": True}, ranks=(16, 32)),
    Entry("lego", ranks=(16, 32)),
    Entry("magnitude", ranks=(16, 32)),
    Entry("dare-ties", ranks=(16, 32)),
    Entry("della", ranks=(16, 32)),
    Entry("breadcrumbs", ranks=(16, 32)),
    Entry("sce", ranks=(16, 32)),
    Entry("knots-dare-ties", ranks=(16, 32)),
    Entry("core-dare-ties", ranks=(16, 32)),
    Entry("multislerp"),
    Entry("karcher"),
    Entry("model-stock", ranks=(16, 32)),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("arena", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default="", help="comma-separated methods")
    parser.add_argument("--ranks", default="", help="comma-separated ranks of each entry's to keep")
    parser.add_argument("--val", type=int, default=300, help="validation examples per task")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arena = _arena(arguments.arena)
    only = set(filter(None, arguments.only.split(",")))
    ranks = set(filter(None, arguments.ranks.split(",")))
    rows = ["|method|rank|scale|mean norm.|" + "|".join(arena.tasks) + "|"]
    rows.append("|-" * (4 + len(arena.tasks)) + "|")
    for entry in ENTRIES:
        if only and entry.method not in only:
            continue
        for rank in entry.ranks:
            if ranks and str(rank) not in ranks:
                continue
            rows.append(_row(arena, arguments.arena, entry, rank, arguments.val))
            print(rows[-1], flush=True)
    if arguments.out:
        arguments.out.write_text("\n".join(rows) + "\n", encoding="utf-8")


def _row(arena: Any, folder: Path, entry: Entry, rank: int | str, val: int) -> str:
    adapters = [folder / "adapters" / task for task in arena.tasks]
    merged = lora_merge.merge(
        adapters,
        method=entry.method,
        rank=rank,
        parameters=entry.parameters,
        dtype="float32",
        jobs=1,
        **entry.settings,
    )
    alignment = align([merged])
    deltas = {
        module.name.removeprefix("bert."): next(read_stacks(alignment, module)).delta()
        for module in alignment.modules
    }
    scale = _best_scale(arena, deltas, val)
    accuracy = arena.score(deltas, scale, "test")
    _, mean = arena.normalise(accuracy, "test")
    cells = [entry.label, str(rank), f"{scale:.3g}", f"{mean:.4f}"]
    return "|" + "|".join(cells + [f"{accuracy[t]:.3f}" for t in arena.tasks]) + "|"


def _best_scale(arena: Any, deltas: dict[str, torch.Tensor], val: int) -> float:
    """Walk uphill on the grid from its start; validation data only."""
    scores: dict[int, float] = {}

    def score(step: int) -> float:
        if step not in scores:
            accuracy = arena.score(deltas, START * STEP**step, "val", val)
            scores[step] = arena.normalise(accuracy, "val")[1]
        return scores[step]

    direction = 1 if score(1) > score(0) else -1
    place = 1 if direction == 1 else 0
    while score(place + direction) > score(place) and abs(place) < 12:
        place += direction
    return START * STEP**place


def _arena(folder: Path) -> Any:
    spec = importlib.util.spec_from_file_location("evaluate", folder / "evaluate.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["evaluate"] = module
    spec.loader.exec_module(module)
    return module.Arena(str(folder))


if __name__ == "__main__":
    main()
