"""What the bytes of a merge depend on, as data: runs apart in time and place can compare it."""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from lora_merge._version import __version__
from lora_merge.adapters.adapter import Adapter
from lora_merge.adapters.measured.fingerprints import fingerprints
from lora_merge.merge.plan import MergePlan


@dataclass(frozen=True)
class Facts:
    """Everything that decides a merge's bytes, as JSON values.

    Attributes:
        lora_merge: Version that merges.
        torch: Version that computes.
        recipe: The recipe, less its adapters.
        result: Digest of ranks, tensors and extras that come out.
        adapters: Of each its name, weight, parameters and what it is recognised by.
    """

    lora_merge: str
    torch: str
    recipe: dict[str, Any]
    result: str
    adapters: list[dict[str, Any]]

    def __post_init__(self) -> None:
        if not all(isinstance(one.get("name"), str) for one in self.adapters):
            raise ValueError("an adapter without a name")

    @property
    def digest(self) -> str:
        """SHA-256 of all of them."""
        return digest_of(asdict(self))


def facts_of(plan: MergePlan) -> Facts:
    """The facts of a plan.

    An adapter is recognised by its header, its config, the content of its first module, and the
    SHA-256 or commit that is known of it, else by the size and time of its file.
    """
    recipe = replace(
        plan.recipe,
        adapters=(),
        merge_method=plan.method.name,
        parameters=asdict(plan.options),
        scale=plan.semantics.scale,
    )
    adapters = plan.alignment.adapters
    result = {
        "ranks": dict(plan.ranks),
        "entries": plan.output.entries(),
        "extras": {name: [a.name for a in owners] for name, owners in plan.extras.items()},
    }
    facts = {
        "lora_merge": __version__,
        "torch": torch.__version__,
        "recipe": asdict(recipe),
        "result": digest_of(result),
        "adapters": [
            {
                "name": adapter.name,
                "weight": weight.to_data(),
                "parameters": {name: value.to_data() for name, value in own.items()},
                "content": _content(adapter, first),
                **file_of(adapter),
            }
            for adapter, weight, own, first in zip(
                adapters, plan.weights, plan.own, fingerprints(adapters), strict=True
            )
        ],
    }
    return Facts(**json.loads(json.dumps(facts)))


def digest_of(facts: Any) -> str:
    """SHA-256 of JSON values."""
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def file_of(adapter: Adapter) -> dict[str, Any]:
    """What tells an adapter's file from a later one of the same name."""
    source = adapter.source
    if source is None:
        return {}
    if source.revision or source.sha256:
        return {"revision": source.revision, "sha256": source.sha256}
    stat = source.weights.stat()
    return {"size": stat.st_size, "modified": stat.st_mtime_ns}


def changed_file(plan: MergePlan, facts: Facts) -> str | None:
    """The adapter whose file is not what it was when the facts were taken; None if there is none.

    Args:
        plan: Its adapters are those of the facts, in the same order.
        facts: From `facts_of`.
    """
    for adapter, known in zip(plan.alignment.adapters, facts.adapters, strict=True):
        now = file_of(adapter)
        if now != {name: known.get(name) for name in now}:
            return adapter.name
    return None


def difference(now: Facts, before: Facts) -> str:
    """The first thing in which two merges' facts differ, in words; "" if they are the same."""
    for library in ("lora_merge", "torch"):
        mine, theirs = getattr(now, library), getattr(before, library)
        if mine != theirs:
            return f"{library} is {mine}, and was {theirs}"
    for name, value in sorted(now.recipe.items(), key=lambda one: one[0] == "scale"):
        other = before.recipe.get(name)
        if value != other:
            return f"the recipe's {name} is {value}, and was {other}"
    known = {one["name"]: one for one in before.adapters}
    for one in now.adapters:
        if one["name"] not in known:
            return f"{one['name']} was not among the adapters"
    gone = known.keys() - {one["name"] for one in now.adapters}
    if gone:
        return f"{min(gone)} is no longer among the adapters"
    for one in now.adapters:
        other = known[one["name"]]
        if one != other and one not in before.adapters:
            what = next((key for key in one if one[key] != other.get(key)), "more is said of it")
            said = {"weight": "has another weight", "parameters": "has other parameters"}
            return f"{one['name']} {said.get(what, f'has changed ({what})')}"
    return "" if now == before else "the result would be another"


def _content(adapter: Adapter, first: str) -> str:
    header = json.dumps({name: list(entry) for name, entry in adapter.tensors.entries().items()})
    return digest_of([header, repr(adapter.config), first])
