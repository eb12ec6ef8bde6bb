"""The first phase: what has to be known of all modules before the first is merged.

The scale where it is left to the adapters, and the statistics of rules that rank the entries of all
modules together. Both are a few numbers per adapter. The run that comes first finds them and leaves
them for the others; ranks that depend on all results are chosen when these are joined.
"""

import contextlib
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_merge.errors import OutputError
from lora_merge.machine.device import pick_device
from lora_merge.machine.parallel import default_jobs
from lora_merge.merge.auto.scale import decided_scale, with_scale
from lora_merge.merge.elementwise.blocks import Statistics
from lora_merge.merge.executor import prepare
from lora_merge.merge.plan import MergePlan
from lora_merge.merge.shards.facts import digest_of, facts_of
from lora_merge.merge.shards.folder import read_json, write_json


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
    path = folder / f"decided-{digest_of(facts_of(plan))[:16]}.json"
    known = read_json(path)
    if known is None:
        place = pick_device(device)
        workers = jobs or (default_jobs() if place.type == "cpu" else 1)
        found = with_scale(plan, device=device)
        shared = prepare(found, place, workers)
        if shared is not None and not isinstance(shared, Statistics):
            return replace(found, shared=shared)  # another package's: every shard finds its own
        folder.mkdir(parents=True, exist_ok=True)
        _leave(path, decision_of(replace(found, shared=shared)))
        known = read_json(path)
    if known is None:
        raise OutputError(f"{path} is damaged", "delete it, and run the shards again")
    return with_decision(plan, known)


def with_decision(plan: MergePlan, decision: Mapping[str, Any]) -> MergePlan:
    """The plan with what another run decided."""
    if plan.semantics.scale == "auto":
        plan = decided_scale(plan, decision["scale"], decision["reason"])
    return replace(plan, shared=_statistics(decision["shared"]))


def decision_of(plan: MergePlan) -> dict[str, Any]:
    """What was decided of a plan, as JSON values."""
    shared = plan.shared if isinstance(plan.shared, Statistics) else None
    statistics = None
    if shared is not None:
        names = ("low", "high", "rescale", "energy", "variance", "majority")
        statistics = {name: getattr(shared, name) for name in names}
    return {
        "scale": plan.semantics.scale,
        "reason": plan.scale_reason,
        "shared": statistics,
    }


def _statistics(known: Mapping[str, Any] | None) -> Statistics | None:
    if known is None:
        return None
    lists = {name: tuple(known[name]) for name in ("low", "high", "rescale", "energy")}
    majority = int(known["majority"])
    return Statistics(**lists, variance=known["variance"], vote=lambda _: majority)


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
