"""What a comparison means for merging: which adapters can be averaged, which conflict, where."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from lora_merge.analysis.compare import Comparison
from lora_merge.analysis.families import RELATED, Tree, tree_of
from lora_merge.analysis.pairs.matrices import PairMatrices
from lora_merge.analysis.pairs.telling import CONFLICT, entangled
from lora_merge.analysis.trajectory import Trajectory, trajectory_of
from lora_merge.printing import Report, Summary

Kind = Literal["same", "opposite", "agree", "independent", "entangled", "conflict", "apart"]

_SAME = 0.99
_AGREE = RELATED
_SHARED_FACTOR = 1 - 1e-6
_SHARED_INIT = 0.5

# The most alarming first.
_ALARM: tuple[Kind, ...] = (
    "conflict", "opposite", "entangled", "same", "agree", "independent", "apart",
)  # fmt: skip

MEANING: dict[Kind, str] = {
    "same": "near-duplicates: keep one",
    "opposite": "near-negations: they cancel",
    "agree": "can be averaged",
    "independent": "unrelated directions: merge them (wudi-iso, tsv) at less than full strength",
    "entangled": "same directions, different use: separate them (wudi-iso, tsv)",
    "apart": "no module in common: put together, they do not touch each other",
    "conflict": "work against each other: gate them instead of merging",
}

Action = Literal["merge", "reweight", "prune", "gate", "last"]

# So many times the median norm, and one adapter drowns the others.
_DROWNING = 8.0
# Less than this of what unrelated adapters keep when they are added, and they undo each other.
_UNDOING = 0.75


@dataclass(frozen=True)
class Verdict:
    """What two adapters are to each other.

    Attributes:
        first: Index of one.
        second: Index of the other.
        kind: The verdict.
        cosine: Of their deltas.
        interference: Relative to chance.
        where: Labels of the modules that decide it, most telling first.
        shared: "A" or "B" where that factor is the same in both, "init" where A is similar.
    """

    first: int
    second: int
    kind: Kind
    cosine: float
    interference: float
    where: tuple[str, ...]
    shared: str | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "where": list(self.where)}


def judge(comparison: Comparison) -> list[Verdict]:
    """A verdict for every pair, the most alarming kinds first."""
    count = len(comparison.adapters)
    verdicts = [_judge_pair(comparison, i, j) for i in range(count) for j in range(i + 1, count)]
    return sorted(verdicts, key=lambda v: (_ALARM.index(v.kind), -abs(v.cosine)))


def _judge_pair(comparison: Comparison, i: int, j: int) -> Verdict:
    total = comparison.total
    cosine = float(total.cosine[i, j])
    excess = _excess(total, i, j)
    if not bool(total.shared[i, j]):
        kind: Kind = "apart"
    elif cosine > _SAME:
        kind = "same"
    elif cosine < -_SAME:
        kind = "opposite"
    elif cosine > _AGREE:
        kind = "agree"
    elif cosine < CONFLICT:
        kind = "conflict"
    else:
        kind = "entangled" if _entangled(total, i, j) else "independent"
    where: tuple[str, ...] = ()
    if kind == "conflict" or kind == "entangled":
        where = comparison.telling.where(kind, i, j)
    return Verdict(i, j, kind, cosine, excess, where, _shared(total, i, j))


def _excess(matrices: PairMatrices, i: int, j: int) -> float:
    chance = float(matrices.chance_interference[i, j])
    return float(matrices.interference[i, j]) / chance if chance > 0 else 0.0


def _entangled(matrices: PairMatrices, i: int, j: int) -> bool:
    """Whether both spaces and the interference lie well above chance."""
    values = (matrices.overlap_in, matrices.overlap_out, matrices.interference)
    chances = (matrices.chance_in, matrices.chance_out, matrices.chance_interference)
    met = entangled(*(torch.stack([x[i, j] for x in both]) for both in (values, chances)))
    return bool(met)


def _shared(total: PairMatrices, i: int, j: int) -> str | None:
    a, b = float(total.factor_a[i, j]), float(total.factor_b[i, j])
    if a > _SHARED_FACTOR and b <= _SHARED_FACTOR:
        return "A"
    if b > _SHARED_FACTOR and a <= _SHARED_FACTOR:
        return "B"
    return "init" if _SHARED_INIT < a <= _SHARED_FACTOR else None


@dataclass(frozen=True)
class SetVerdict:
    """What to do with a set of adapters.

    Attributes:
        action: Merge them, choose weights first, leave some out first, keep them apart, or take
            the last one of a run's checkpoints.
        reason: The numbers that say so.
        command: The next step, with ... for the adapters.
        adapters: Indices of those that it is about: to leave out, or that drown the others.
    """

    action: Action
    reason: str
    command: str
    adapters: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "adapters": list(self.adapters)}


def judge_set(comparison: Comparison, verdicts: Sequence[Verdict]) -> SetVerdict:
    """What to do with all adapters together.

    Args:
        comparison: Of the adapters.
        verdicts: Its pairs', from `judge`.
    """
    total, count = comparison.total, len(comparison.adapters)
    norms = total.norms.tolist()
    empty = [i for i, norm in enumerate(norms) if norm == 0]
    if empty:
        return SetVerdict("prune", "every delta of some is zero", _MERGE, tuple(empty))
    copies = sorted({v.second for v in verdicts if v.kind == "same"})
    if copies:
        return SetVerdict(
            "prune", f"cosines above {_SAME}: copies count twice", _MERGE, tuple(copies)
        )
    against = [v for v in verdicts if v.kind in ("conflict", "opposite")]
    kept, unrelated = total.set_cancellation, _unrelated(norms)
    if 2 * len(against) > len(verdicts) or kept < _UNDOING * unrelated:
        reason = (
            f"{len(against)} of {len(verdicts)} pairs work against each other; added together they "
            f"keep {100 * kept:.0f} % of their norms, unrelated ones {100 * unrelated:.0f} %"
        )
        return SetVerdict("gate", reason, _GATE)
    median = sorted(norms)[(count - 1) // 2]
    large = tuple(i for i, norm in enumerate(norms) if norm > _DROWNING * median)
    if large:
        most = max(norms) / median
        reason = f"the largest is {most:.0f} times as long as the median and drowns the others"
        return SetVerdict("reweight", reason, _SEARCH, large)
    cosine = sum(v.cosine for v in verdicts) / len(verdicts)
    if all(v.kind == "agree" for v in verdicts):
        reason = f"all are alike (mean cosine {cosine:.2f}): their mean keeps what they share"
        return SetVerdict("merge", reason, "lora-merge merge ... -M mean")
    reason = (
        f"mean cosine {cosine:.2f}; added together they keep {100 * kept:.0f} % of their norms "
        f"(unrelated ones: {100 * unrelated:.0f} %), so each must be applied at less than full "
        "strength, which the default --scale auto does"
    )
    return SetVerdict("merge", reason, _MERGE)


_MERGE = "lora-merge merge ... --rank 16"
_GATE = "lora-merge gate ..."
_SEARCH = "lora-merge search RECIPE --base DIR --data FILE (weights on examples), or -w by hand"


def _unrelated(norms: Sequence[float]) -> float:
    """|sum| over the sum of norms, for orthogonal adapters of these norms."""
    return math.sqrt(sum(norm**2 for norm in norms)) / sum(norms)


@dataclass(frozen=True, repr=False)
class Judgement(Report):
    """What a comparison means for merging. Iterates over the pairs' verdicts.

    Attributes:
        adapters: Their names.
        pairs: One verdict per pair, the most alarming first.
        whole: What to do with all of them together.
        tree: Who is near whom; None of two adapters.
        way: Of the checkpoints of one run, the way it went; None of other adapters.
    """

    adapters: tuple[str, ...]
    pairs: tuple[Verdict, ...]
    whole: SetVerdict
    tree: Tree | None
    way: Trajectory | None = None

    def __iter__(self) -> Iterator[Verdict]:
        return iter(self.pairs)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, place: int) -> Verdict:
        return self.pairs[place]

    def summary(self) -> Summary:
        """What to do with all, and how many pairs are what."""
        kinds = Counter(verdict.kind for verdict in self.pairs)
        facts = [("together", f"{self.whole.action}: {self.whole.reason}")]
        facts += [(kind, f"{n} pairs: {MEANING[kind]}") for kind, n in kinds.items()]
        return Summary(f"Verdict on {len(self.adapters)} adapters", tuple(facts))

    def rows(self) -> list[dict[str, Any]]:
        """One row per pair."""
        return [
            {
                **verdict.to_dict(),
                "first": self.adapters[verdict.first],
                "second": self.adapters[verdict.second],
            }
            for verdict in self.pairs
        ]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        said: dict[str, Any] = {
            "verdicts": [v.to_dict() for v in self.pairs],
            "set": self.whole.to_dict(),
        }
        tree = {} if self.tree is None else {"tree": self.tree.to_dict()}
        way = {} if self.way is None else {"trajectory": self.way.to_dict()}
        return {**said, **tree, **way}


def judgement(comparison: Comparison) -> Judgement:
    """Verdicts on every pair and on all together, and the tree."""
    pairs = judge(comparison)
    tree = tree_of(comparison.total.cosine) if len(comparison.adapters) > 2 else None
    way = trajectory_of(comparison)
    whole = judge_set(comparison, pairs)
    if way is not None:
        whole = SetVerdict("merge" if way.wandering else "last", way.reason, way.command)
    return Judgement(comparison.adapters, tuple(pairs), whole, tree, way)
