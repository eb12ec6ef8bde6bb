"""What a comparison means for merging: which adapters can be averaged, which conflict, where."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from lora_merge.analysis.compare import Comparison, PairMatrices

Kind = Literal["same", "opposite", "agree", "independent", "entangled", "conflict", "apart"]

_SAME = 0.99
_AGREE = 0.2
_CONFLICT = -0.05
# Interference of unrelated adapters scatters around chance; this far above it, they meet.
_ENTANGLED = 1.5
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
    "independent": "unrelated directions: add them (cat, sum); an average only shrinks each",
    "entangled": "same directions, different use: separate them (tsv, knots, ties)",
    "apart": "no module in common: put together, they do not touch each other",
    "conflict": "work against each other: ties, or gate them instead of merging",
}


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
    elif cosine < _CONFLICT:
        kind = "conflict"
    else:
        kind = "entangled" if _entangled(total, i, j) else "independent"
    return Verdict(i, j, kind, cosine, excess, _where(comparison, i, j, kind), _shared(total, i, j))


def _where(comparison: Comparison, i: int, j: int, kind: Kind) -> tuple[str, ...]:
    """The modules that show most of what a verdict says, at most three."""
    if kind not in ("conflict", "entangled"):
        return ()
    scored = []
    for module in comparison.modules:
        cosine, excess = float(module.cosine[i, j]), _excess(module, i, j)
        score = -cosine if kind == "conflict" else excess
        telling = cosine < _CONFLICT if kind == "conflict" else _entangled(module, i, j)
        if telling:
            scored.append((-score, module.label))
    return tuple(label for _, label in sorted(scored)[:3])


def _excess(matrices: PairMatrices, i: int, j: int) -> float:
    chance = float(matrices.chance_interference[i, j])
    return float(matrices.interference[i, j]) / chance if chance > 0 else 0.0


def _entangled(matrices: PairMatrices, i: int, j: int) -> bool:
    """Whether both spaces and the interference lie well above chance."""
    pairs = (
        (matrices.overlap_in, matrices.chance_in),
        (matrices.overlap_out, matrices.chance_out),
        (matrices.interference, matrices.chance_interference),
    )
    return all(float(value[i, j]) > _ENTANGLED * float(chance[i, j]) for value, chance in pairs)


def _shared(total: PairMatrices, i: int, j: int) -> str | None:
    a, b = float(total.factor_a[i, j]), float(total.factor_b[i, j])
    if a > _SHARED_FACTOR and b <= _SHARED_FACTOR:
        return "A"
    if b > _SHARED_FACTOR and a <= _SHARED_FACTOR:
        return "B"
    return "init" if _SHARED_INIT < a <= _SHARED_FACTOR else None
