"""The first phase: what has to be known of all modules before the first is merged.

The scale where it is left to the adapters, and the statistics of rules that rank the entries of all
modules together. Both are a few numbers per adapter. The run that comes first finds them and leaves
them for the others; ranks that depend on all results are chosen when these are joined.
"""

import contextlib
import os
from dataclasses import asdict, dataclass, replace
from math import isfinite, isnan
from pathlib import Path
from typing import Any

from lora_merge.errors import OutputError
from lora_merge.machine.device import pick_device, workers_on
from lora_merge.merge.auto.scale import decided_scale, with_scale
from lora_merge.merge.elementwise.blocks import Statistics
from lora_merge.merge.executor import prepare
from lora_merge.merge.plan import MergePlan
from lora_merge.merge.shards.facts import facts_of
from lora_merge.merge.shards.plain_files import read_record, write_json

_REMEDY = "delete it, and run the shards again"


@dataclass(frozen=True)
class Shared:
    """`Statistics` as plain data; of the vote its end."""

    low: tuple[float, ...]
    high: tuple[float, ...]
    rescale: tuple[float, ...]
    energy: tuple[float, ...]
    variance: float
    majority: float


@dataclass(frozen=True)
class Decision:
    """What was decided of a plan.

    Attributes:
        scale: The scale, and "auto" where it is not decided.
        reason: Why it is that.
        shared: The rule's statistics; None where it needs none.
    """

    scale: float | str
    reason: str
    shared: Shared | None


def decided(plan: MergePlan, folder: Path, *, jobs: int | None, device: str) -> MergePlan:
    """The plan with everything decided that depends on all modules but the ranks.

    Args:
        plan: As planned from headers.
        folder: That of all shards; what is decided is left there, and found there.
        jobs: Worker threads.
        device: Where to compute.
    """
    automatic = plan.semantics.scale == "auto"
    if not automatic and plan.method.prepare is None:
        return plan
    path = folder / f"decided-{facts_of(plan).digest[:16]}.json"
    if not path.exists():
        place = pick_device(device)
        workers = workers_on(place, jobs, plan.peak_bytes(1))
        found = with_scale(plan, device=device)
        shared = prepare(found, place, workers)
        if shared is not None and not isinstance(shared, Statistics):
            return replace(found, shared=shared)  # another package's: every shard finds its own
        folder.mkdir(parents=True, exist_ok=True)
        _leave(path, asdict(decision_of(replace(found, shared=shared))))
    return with_decision(plan, read_record(Decision, path, _REMEDY), str(path))


def with_decision(plan: MergePlan, decision: Decision, what: str) -> MergePlan:
    """The plan with what another run decided.

    Args:
        plan: As planned from headers.
        decision: Of the same plan.
        what: Where it stood, for messages.

    Raises:
        OutputError: If it is no decision on this plan.
    """
    if plan.semantics.scale == "auto":
        scale = decision.scale
        if isinstance(scale, str) or not isfinite(scale):
            raise OutputError(f"{what}: {scale!r:.40} is no scale", _REMEDY)
        plan = decided_scale(plan, scale, decision.reason)
    shared = decision.shared
    if shared is None:
        return plan
    lists = (shared.low, shared.high, shared.rescale, shared.energy)
    numbers = [value for values in lists for value in values] + [shared.variance]
    if {len(values) for values in lists} != {len(plan.weights)} or any(map(isnan, numbers)):
        raise OutputError(f"{what} holds no statistics of these adapters", _REMEDY)
    majority = 1 if shared.majority >= 0 else -1
    return replace(plan, shared=Statistics(*lists, shared.variance, lambda _: majority))


def decision_of(plan: MergePlan) -> Decision:
    """What was decided of a plan."""
    found = plan.shared if isinstance(plan.shared, Statistics) else None
    shared = None
    if found is not None:
        lists = (found.low, found.high, found.rescale, found.energy)
        shared = Shared(*lists, found.variance, found.majority)
    return Decision(plan.semantics.scale, plan.scale_reason, shared)


def _leave(path: Path, data: dict[str, Any]) -> None:
    """Write a file unless somebody else has by now: all shards must read the same numbers."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    write_json(part, data)
    try:
        os.link(part, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        with contextlib.suppress(FileNotFoundError):
            part.replace(path)
    part.unlink(missing_ok=True)
