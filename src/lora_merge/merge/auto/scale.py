"""`scale: auto`: how much of a merged delta to apply, from the adapters and the method alone.

A sum of N adapters of unrelated tasks is sqrt(N) times as long as one of them, and to each of them
the others are a disturbance. On validation data of leave-some-out subsets of a benchmark (two to
five adapters; ranks 16 and full; sums, least squares, TSV, TIES) the best result was about as long
as one adapter, whatever the method made of it: 1.1 times that for plain sums, 1.2 to 1.4 times for
methods that keep adapters out of each other's way, more the more adapters are apart
(docs/which-method.md says how well the rule does).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import sqrt

from lora_merge.adapters.aligned_module import AlignedModule
from lora_merge.machine.device import pick_device
from lora_merge.merge.executor import merged_modules
from lora_merge.merge.plan import MergePlan

# Modules that are looked at, evenly spread, both ends among them.
_SAMPLE = 12
# How much longer than one adapter a result may be: of plain sums, and of separating methods.
_ROOM, _ROOM_APART = 0.1, 0.45


@dataclass(frozen=True)
class Lengths:
    """What the rule knows, each a mean of squared norms over the modules that were looked at.

    Attributes:
        one: Of one adapter.
        all: Of the plain sum of the adapters.
        merged: Of what the method makes of them, at its rank.
        apart: For how many unrelated adapters these count: N, and 1 where all are alike.
    """

    one: float
    all: float
    merged: float
    apart: float


def with_scale(plan: MergePlan, *, device: str = "cpu") -> MergePlan:
    """The plan with its scale decided, if it is "auto", and the reason among its notes.

    Args:
        plan: A plan. A few of its modules are merged to measure.
        device: Where to compute.
    """
    if plan.semantics.scale != "auto":
        return plan
    why = _left_alone(plan)
    if why:
        return decided_scale(plan, 1.0, f"scale 1: {why}")
    found = measure(plan, device)
    if not (found.merged > 0 and found.all > 0):
        return decided_scale(plan, 1.0, "scale 1: what was looked at is zero")
    value = rule(found, plan.method.separates)
    scale = float(f"{value:.3g}")
    reason = (
        f"scale {scale:g}: the adapters' sum is {sqrt(found.all / found.one):.2f} times as long as "
        f"one of them, {plan.method.name} makes that {sqrt(found.merged / found.one):.2f}; "
        f"{scale * sqrt(found.merged / found.one):.2f} disturbs each other least (--scale 1: as "
        "published)"
    )
    return decided_scale(plan, scale, reason)


def decided_scale(plan: MergePlan, scale: float, reason: str) -> MergePlan:
    """The plan with a scale instead of "auto", and why."""
    semantics = replace(plan.semantics, scale=scale)
    notes = (*plan.notes, reason)
    return replace(plan, semantics=semantics, scale_reason=reason, notes=notes)


def rule(found: Lengths, separates: bool) -> float:
    """The scale that makes a merge a little longer than one adapter.

    c = 1 + room (1 - 1 / apart); scale = min(1, c |one| / |all|) |all| / |merged|: a sum is never
    made longer than it is, and what a method has shrunk is given back.
    """
    room = _ROOM_APART if separates else _ROOM
    wanted = (1 + room * (1 - 1 / max(found.apart, 1.0))) * sqrt(found.one / found.all)
    return min(1.0, wanted) * sqrt(found.all / found.merged)


def measure(plan: MergePlan, device: str) -> Lengths:
    """Merge an even spread of modules and measure what goes in and comes out."""
    modules = _spread(plan.alignment.modules)
    part = replace(plan, alignment=replace(plan.alignment, modules=tuple(modules)))
    one = total = merged = counted = 0.0
    for result in merged_modules(part, pick_device(device)):
        squares = [square for square in result.adapter_squares if square > 0]
        if not squares:
            continue
        mean = sum(squares) / len(squares)
        one += mean
        counted += len(squares) ** 2 * mean
        total += result.exact_norm**2
        merged += result.square
    most = max(len(m.specs) for m in modules)
    return Lengths(one, total, merged, min(counted / total if total > 0 else 1.0, float(most)))


def _spread(modules: Sequence[AlignedModule]) -> list[AlignedModule]:
    if len(modules) <= _SAMPLE:
        return list(modules)
    return [modules[i * (len(modules) - 1) // (_SAMPLE - 1)] for i in range(_SAMPLE)]


def _left_alone(plan: MergePlan) -> str:
    """Why the result is left as the method makes it; "" if it is not."""
    semantics = plan.semantics
    if max(len(m.specs) for m in plan.alignment.modules) == 1:
        return "no two adapters meet"
    if plan.method.exact:
        return f"{plan.method.name} says exactly what comes out"
    if any(weight.constant != 1.0 for weight in plan.weights):
        return "weights were given"
    if (semantics.normalize or plan.method.normalize) != "none":
        return "the weights are shares"
    if semantics.restore_norm != "none":
        return "the norm is restored"
    return ""
