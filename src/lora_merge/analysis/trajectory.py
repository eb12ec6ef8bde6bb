"""The way of one run through its checkpoints: when it stopped moving, which of them to average."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lora_merge.adapters.references import in_order, is_run
from lora_merge.analysis.compare import Comparison

# A checkpoint this near to the last, over the last one's norm, is where it ended.
_ARRIVED = 0.1
_LEAST = 3  # checkpoints of which it can be told whether they wander


@dataclass(frozen=True)
class Step:
    """One checkpoint.

    Attributes:
        name: Its name.
        norm: Frobenius norm of its delta.
        moved: Distance from the checkpoint before, over the last one's norm; 0 of the first.
        left: Distance to the last checkpoint, over the last one's norm.
        cosine: With the last checkpoint.
    """

    name: str
    norm: float
    moved: float
    left: float
    cosine: float


@dataclass(frozen=True)
class Trajectory:
    """Checkpoints in their order.

    Attributes:
        steps: The oldest first.
        settled: The first from which on all lie near the last one, by its place; None if only
            the last itself does.
        wandering: How many of the last go back and forth rather than on, at least three; 0 if
            the run still went somewhere.
        straightness: Net way over whole way of these, or of the last three.
        reason: The numbers that say what to do.
        command: The next step, with ... for the checkpoints.
    """

    steps: tuple[Step, ...]
    settled: int | None
    wandering: int
    straightness: float
    reason: str
    command: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "steps": [vars(step) for step in self.steps]}


def trajectory_of(comparison: Comparison) -> Trajectory | None:
    """The way of a run, if the adapters are checkpoints of one: names that differ in numbers alone.

    The last K checkpoints wander where their net way is no longer than that of a random walk of as
    many steps: |D_K - D_1| <= sum |D_i+1 - D_i| / sqrt(K - 1). Their mean then is nearer to what
    they wander about than the last one is; of a run that goes on, a mean lags behind.
    """
    names = comparison.adapters
    if len(names) < _LEAST or not is_run(names):
        return None
    order = [names.index(name) for name in in_order(names)]
    norms = [float(comparison.total.norms[i]) for i in order]
    if norms[-1] == 0:
        return None
    cosine = [[float(comparison.total.cosine[i, j]) for j in order] for i in order]

    def between(i: int, j: int) -> float:
        square = norms[i] ** 2 + norms[j] ** 2 - 2 * cosine[i][j] * norms[i] * norms[j]
        return math.sqrt(max(square, 0.0)) / norms[-1]

    last = len(order) - 1
    moves = [between(t - 1, t) for t in range(1, last + 1)]
    steps = tuple(
        Step(names[i], norms[t], moves[t - 1] if t else 0.0, between(t, last), cosine[t][last])
        for t, i in enumerate(order)
    )
    near = [t for t in range(last) if all(step.left <= _ARRIVED for step in steps[t:])]
    straight = {
        k: _straightness(between(last - k + 1, last), moves[-(k - 1) :])
        for k in range(_LEAST, last + 2)
    }
    wandering = max((k for k, s in straight.items() if s <= 1 / math.sqrt(k - 1)), default=0)
    shown = straight[wandering or _LEAST]
    reason, command = _advice(steps, near, wandering, shown)
    return Trajectory(steps, near[0] if near else None, wandering, shown, reason, command)


def _straightness(net: float, moves: Sequence[float]) -> float:
    """Net way over whole way; 0 of what did not move."""
    whole = math.fsum(moves)
    return net / whole if whole > 0 else 0.0


def _advice(
    steps: Sequence[Step], near: Sequence[int], wandering: int, straight: float
) -> tuple[str, str]:
    if near:
        where = f"within {100 * _ARRIVED:.0f} % of the end since {_short(steps[near[0]].name)}"
    else:
        where = f"the last step alone was {100 * steps[-1].moved:.0f} % of the norm"
    if not wandering:
        reason = (
            f"{where}; the last {_LEAST} still go on (net way {100 * straight:.0f} % of the way "
            "walked): a mean would lag behind, take the last"
        )
        return reason, f"use {steps[-1].name} as it is"
    reason = (
        f"{where}; the last {wandering} go back and forth (net way {100 * straight:.0f} % of the "
        "way walked): average them"
    )
    return reason, f"lora-merge merge ... --schedule last:{wandering}"


def _short(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2]
