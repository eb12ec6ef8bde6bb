"""Score merge methods on an arena of tasks: a folder with adapters, heads, data and evaluate.py.

    python benchmarks/quality.py ARENA --out benchmarks/results/quality.md [--only wudi,tsv]
        [--ranks 16] [--tasks a,b,c] [--val 200]

For every method and rank: merge, choose the scale (and, where the row says so, the adapters'
weights) on the validation split alone, score once on the test split. The number is the mean over
tasks of accuracy over that of the task's own adapter. On validation accuracy is smoothed, the mean
of sigmoid(2 x margin) of the logits: it differs less by chance between two scales. The linear
layers run in bfloat16 (three times as fast). Methods that need statistics get those of 64
validation texts per task, without labels.

Rows that the file has already are kept, so that a run can be continued.
"""

import argparse
import importlib.util
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import lora_merge
from lora_merge.adapters.alignment import align, read_stacks
from lora_merge.merge.methods.registry import find_method

# Scales are START * STEP**k; weights are powers of WEIGHT_STEP.
START, STEP, WEIGHT_STEP = 0.65, 1.12, 1.15
BATCH = 128
TEXTS = 64  # of each task, for statistics
Rank = int | str
Weights = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Entry:
    """One row per rank: a method with its parameters.

    Attributes:
        reference: Scores of others by rank, from the arena's REFERENCE.md.
        anchors: Numbers to choose per adapter besides the scale: none, one weight, or weights
            between which the layers' are interpolated.
        auto: The scale is the rule's (`scale: auto`), not chosen on the validation split.
    """

    method: str
    parameters: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    ranks: tuple[Rank, ...] = (16, 32, "full")
    reference: dict[Rank, float] = field(default_factory=dict)
    anchors: int = 0
    auto: bool = False

    @property
    def label(self) -> str:
        """Method and what differs from its defaults."""
        extras = {**self.parameters, **self.settings}
        words = [self.method, *(f"{k}={v}" for k, v in extras.items())]
        words += ["scale=auto"] if self.auto else []
        return " ".join(words) + ("", " + weights", " + weights by layer")[self.anchors]


OUTPUT = {"side": "output", "ridge": 0.01}
ENTRIES = (
    Entry("lego-refit", auto=True, ranks=(16, 32)),
    Entry("wudi-iso", auto=True),
    Entry("regmean-iso", auto=True),
    Entry("svd", auto=True, ranks=(16, 32, "full")),
    Entry("tsv", auto=True),
    Entry("ties", auto=True, ranks=(16,)),
    Entry("lego-refit", ranks=(16, 32)),
    Entry("lego-refit", {"importance": "none"}, ranks=(16, 32)),
    Entry("lego-refit", {"refit": "up", "importance": "size"}, ranks=(16, 32)),
    Entry("wudi-iso"),
    Entry("regmean-iso"),
    Entry("regmean"),
    Entry("ssr"),
    Entry("esm"),
    Entry("dc-merge"),
    Entry("dc-merge", {"smoothing": "linear"}, ranks=(16, "full")),
    Entry("wudi", OUTPUT, reference={16: 0.9308, "full": 0.9473}),
    Entry("wudi-iso", anchors=1),
    Entry("wudi-iso", anchors=2),
    Entry("tsv", reference={16: 0.9200, 32: 0.9414, "full": 0.9442}),
    Entry("iso-c", reference={16: 0.9028, 32: 0.9347, "full": 0.9424}),
    Entry("task-arithmetic", reference={16: 0.9041, 32: 0.9289, "full": 0.9337}),
    Entry("wudi-iso", {"beta": 0.5}, ranks=("full",)),
    Entry("iso-cts"),
    Entry("ctm", ranks=(16, 32), reference={16: 0.9176, 32: 0.9286}),
    Entry("ctm", {"inner": "iso-c"}, ranks=(16, 32), reference={16: 0.9207, 32: 0.9361}),
    Entry("wudi", reference={16: 0.9104, 32: 0.9280, "full": 0.9323}),
    Entry("wudi", {"side": "both"}),
    Entry("lego", {"balance": True}, ranks=(16, 32), reference={16: 0.8842, 32: 0.8811}),
    Entry("lego", {"balance": True, "units": "normalized"}, ranks=(16, 32)),
    Entry("ties", reference={16: 0.8859, 32: 0.9226}),
    Entry("knots-ties", {"density": 0.3}, reference={16: 0.8594, 32: 0.9147, "full": 0.9251}),
    Entry("core-ties", {"density": 0.3}, reference={16: 0.8733, 32: 0.9138, "full": 0.9295}),
    Entry("magnitude", ranks=(16, 32), reference={16: 0.9053, 32: 0.9294}),
    Entry("dare", ranks=(16, 32), reference={16: 0.9058, 32: 0.9280}),
    Entry("dare-ties", ranks=(16, 32), reference={16: 0.8814, 32: 0.9057}),
    Entry("task-arithmetic", {}, {"svc": True}, ranks=(16, "full")),
    Entry("task-arithmetic", {}, {"pico": True}, ranks=(16, "full")),
    Entry("wudi-iso", {}, {"pico": True}, ranks=(16, "full")),
    Entry("wudi-iso", {}, {"norm_equalise": True}, ranks=(16, "full")),
    Entry("wudi", {**OUTPUT, "compress": "frobenius"}, ranks=(16,)),
    Entry("della", ranks=(16, 32)),
    Entry("breadcrumbs", ranks=(16, 32)),
    Entry("sce", ranks=(16, 32)),
    Entry("knots-dare-ties", ranks=(16, 32)),
    Entry("core-dare-ties", ranks=(16, 32)),
    Entry("multislerp", ranks=(16, "full")),
    Entry("karcher", ranks=(16, "full")),
    Entry("lego", ranks=(16, 32)),
)

AFTER = """
The scale of rows with scale=auto is the rule's (docs/which-method.md), and no labels were used.
Those of lego-refit and regmean-iso were chosen with --val 150, of dc-merge, esm and regmean with
--val 100; esm at rank 16 stands at the end of the scales that were tried. A flattened spectrum, as
dc-merge and esm leave it, does not survive a cut to a small rank.

cat, svd, mean, fedavg and model-stock are task arithmetic up to a scale (per module for
model-stock), core-tsv and core-iso are tsv and iso-c. linear-factors, robustmerge and aligned-mean
need adapters of one rank, slerp takes two. regmean, regmean-iso, ssr and esm got 64 validation
texts per task, without labels; regmean-iso sets its scale itself.

The reference column has plain dense implementations, and PEFT 0.21.2 where a method is PEFT's
(ties_svd, dare_linear_svd, dare_ties_svd and magnitude_prune_svd, the best of their densities),
under the same protocol on a coarser grid of scales. Differences under about 0.004 are within the
noise of 4,500 test examples and of the choice of scale.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("arena", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="", help="comma-separated methods")
    parser.add_argument("--ranks", default="", help="comma-separated ranks of each entry's to keep")
    parser.add_argument("--tasks", default="", help="comma-separated tasks to merge, default all")
    parser.add_argument("--val", type=int, default=200, help="validation examples per task")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arena = _arena(arguments.arena, list(filter(None, arguments.tasks.split(","))))
    only = set(filter(None, arguments.only.split(",")))
    ranks = set(filter(None, arguments.ranks.split(",")))
    rows = _rows_of(arguments.out)
    for entry in ENTRIES:
        place = Place(0, None if entry.anchors else ((1.0,),) * len(arena.tasks))
        for rank in entry.ranks:
            key = (entry.label, str(rank))
            if key in rows:
                place = place if entry.auto else _place_of(rows[key], place)
            elif (not only or entry.method in only) and (not ranks or str(rank) in ranks):
                trial = Trial(arena, arguments.arena, entry, rank, arguments.val)
                rows[key], place = _row(trial, place)
                print(rows[key], flush=True)
                _write(arguments.out, arena, rows, arguments.val)


@dataclass(frozen=True)
class Place:
    """What was chosen at one rank, for the next to start from.

    Attributes:
        step: The scale's place on its grid.
        weights: Each adapter's; None where they are still to be searched.
    """

    step: int
    weights: Weights | None


@dataclass(frozen=True)
class Trial:
    """An entry at a rank on an arena."""

    arena: Any
    folder: Path
    entry: Entry
    rank: Rank
    val: int

    def merged(self, weights: Weights) -> dict[str, Tensor]:
        """The merge's dense deltas by module, at scale 1."""
        alignment = align([self.adapter(weights, 1.0)])
        return {
            module.name.removeprefix("bert."): next(read_stacks(alignment, module)).delta()
            for module in alignment.modules
        }

    def adapter(self, weights: Weights, scale: Any) -> Any:
        """The merge."""
        return lora_merge.merge(
            [self.folder / "adapters" / task for task in self.arena.tasks],
            method=self.entry.method,
            rank=self.rank,
            weights=[w[0] if len(w) == 1 else list(w) for w in weights],
            parameters=self.entry.parameters,
            dtype="float32",
            jobs=1,
            scale=scale,
            statistics=_statistics(self.arena, self.folder, self.entry.method),
            **self.entry.settings,
        )

    def validation(self, deltas: dict[str, Tensor], scale: float) -> float:
        """Mean smoothed accuracy over that of the own adapters."""
        own: dict[str, float] = self.arena.index["individual"]["val"]
        found = _margins(self.arena, deltas, scale, "val", self.val)
        shares = [float(torch.sigmoid(2 * m).mean()) / own[t] for t, m in found.items()]
        return sum(shares) / len(shares)


@cache
def _collected(arena: Any, folder: Path) -> str:
    """A file of what the modules see of each task's texts, its own adapter active."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder / "base", dtype=torch.float32).eval()
    batches = []
    for task in arena.tasks:
        ids, lengths, _ = arena._split(task, "val", TEXTS)
        mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
        ids = ids[:, : int(lengths.max())]
        batches.append([{"input_ids": ids, "attention_mask": mask.long()}])
    file = Path(tempfile.mkdtemp()) / "statistics.safetensors"
    adapters = [folder / "adapters" / task for task in arena.tasks]
    lora_merge.collect_statistics(model, adapters, batches, file, inputs=True)
    return str(file)


def _statistics(arena: Any, folder: Path, method: str) -> str | None:
    return _collected(arena, folder) if find_method(method).needs else None


def _row(trial: Trial, place: Place) -> tuple[str, Place]:
    """A row of the table; weights are searched once, at the first rank."""
    arena = trial.arena
    weights = place.weights or ((1.0,) * trial.entry.anchors,) * len(arena.tasks)
    deltas = trial.merged(weights)
    if trial.entry.auto:
        step, scale = 0, trial.adapter(weights, "auto").report.scale
    else:
        step = _climb(lambda k: trial.validation(deltas, START * STEP**k), place.step)
        scale = START * STEP**step
    if place.weights is None:
        weights = _best_weights(trial, weights, scale)
        deltas = trial.merged(weights)
    accuracy = {
        task: float((margin > 0).double().mean())
        for task, margin in _margins(arena, deltas, scale, "test", None).items()
    }
    _, mean = arena.normalise(accuracy, "test")
    reference = trial.entry.reference.get(trial.rank)
    chosen = " ".join(["/".join(f"{x:.3g}" for x in w) for w in weights if trial.entry.anchors])
    cells = [trial.entry.label, str(trial.rank), f"{mean:.4f}"]
    cells += [f"{reference:.4f}" if reference else "", f"{scale:.3g} {chosen}".strip()]
    cells += [f"{accuracy[task]:.3f}" for task in arena.tasks]
    return "|" + "|".join(cells) + "|", Place(step, weights)


def _place_of(row: str, before: Place) -> Place:
    """What an earlier run chose."""
    scale, *texts = row.strip("|").split("|")[4].split()
    weights = tuple(tuple(float(x) for x in text.split("/")) for text in texts)
    return Place(round(math.log(float(scale) / START, STEP)), weights or before.weights)


def _climb(score: Callable[[int], float], start: int) -> int:
    """Walk uphill on whole numbers."""
    scores = {k: score(k) for k in (start, start + 1)}
    direction = 1 if scores[start + 1] > scores[start] else -1
    place = max(scores, key=scores.__getitem__)
    while abs(place - start) < 24:
        ahead = place + direction
        scores[ahead] = score(ahead)
        if scores[ahead] <= scores[place]:
            break
        place = ahead
    return place


def _best_weights(trial: Trial, weights: Weights, scale: float) -> Weights:
    """Coordinate ascent on the validation split: one number at a time, two rounds."""
    best = trial.validation(trial.merged(weights), scale)
    places = [(i, k) for i, own in enumerate(weights) for k in range(len(own))]
    for _ in range(2):
        before = weights
        for place in places:
            for factor in (WEIGHT_STEP, 1 / WEIGHT_STEP):
                tried = _times(weights, place, factor)
                score = trial.validation(trial.merged(tried), scale)
                if score > best:
                    weights, best = tried, score
                    break
        if weights == before:
            break
    return weights


def _times(weights: Weights, place: tuple[int, int], factor: float) -> Weights:
    return tuple(
        tuple(x * factor if (i, k) == place else x for k, x in enumerate(own))
        for i, own in enumerate(weights)
    )


@torch.no_grad()
def _margins(
    arena: Any, deltas: dict[str, Tensor], scale: float, split: str, count: int | None
) -> dict[str, Tensor]:
    """For each example of each task: logit of the true class minus the largest other one."""
    arena.bert.set_delta(deltas, scale)
    found = {}
    for task in arena.tasks:
        ids, lengths, labels = arena._split(task, split, count)
        head = arena.head[task]
        parts = []
        for part in _batches(len(labels)):
            with torch.autocast("cpu", torch.bfloat16):
                x = arena.bert.features(ids[part, : int(lengths[part].max())], lengths[part])
            logits = F.linear(x.float(), head["weight"], head["bias"])
            true = labels[part, None]
            others = logits.scatter(1, true, -torch.inf).amax(dim=1)
            parts.append(logits.gather(1, true)[:, 0] - others)
        found[task] = torch.cat(parts)
    return found


def _batches(count: int) -> Iterator[slice]:
    yield from (slice(start, start + BATCH) for start in range(0, count, BATCH))


def _rows_of(path: Path) -> dict[tuple[str, str], str]:
    """Rows that an earlier run wrote, by method and rank."""
    if not path.exists():
        return {}
    rows = [r for r in path.read_text(encoding="utf-8").splitlines() if r.startswith("|")]
    cells = [[c.strip() for c in row.strip("|").split("|")] for row in rows[2:]]
    return {(c[0], c[1]): "|" + "|".join(c) + "|" for c in cells}


def _write(path: Path, arena: Any, rows: dict[tuple[str, str], str], val: int) -> None:
    names = ", ".join(arena.tasks)
    lines = [
        f"# Merge quality on an arena of {len(arena.tasks)} tasks",
        "",
        f"`python benchmarks/quality.py ARENA --out benchmarks/results/quality.md --val {val}`:",
        f"LoRA adapters of one base model ({names}; mixed ranks). Scale, and weights where a row",
        f"says so, chosen on {val} validation examples per task; test split scored once. Mean over",
        "tasks of accuracy over that of the task's own adapter; then the accuracies.",
        "",
        "|method|rank|mean norm.|reference|scale, weights|" + "|".join(arena.tasks) + "|",
        "|-" * (5 + len(arena.tasks)) + "|",
    ]
    order = [(entry.label, str(rank)) for entry in ENTRIES for rank in entry.ranks]
    lines += [rows[key] for key in order if key in rows]
    path.write_text("\n".join(lines) + "\n" + AFTER, encoding="utf-8")


def _arena(folder: Path, tasks: list[str]) -> Any:
    spec = importlib.util.spec_from_file_location("evaluate", folder / "evaluate.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["evaluate"] = module
    spec.loader.exec_module(module)
    return module.Arena(str(folder), tasks or None)


if __name__ == "__main__":
    main()
