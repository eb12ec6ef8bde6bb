"""`lora_merge.run_shard`: one part of a merge, on this machine, for `join` to put together."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_merge.adapters.aligned_module import AlignedModule
from lora_merge.arguments import takes
from lora_merge.errors import OutputError
from lora_merge.files.documents import parse_yaml
from lora_merge.files.targets import check_target
from lora_merge.merge.executor import compute
from lora_merge.merge.plan import MergePlan, plan_merge
from lora_merge.merge.recipe.arguments import RunShard
from lora_merge.merge.recipe.read import as_recipe, inputs_of, open_recipe
from lora_merge.merge.run import PlannedMerge
from lora_merge.merge.shards.decided import decided, decision_of, with_decision
from lora_merge.merge.shards.facts import changed_file, facts_of
from lora_merge.merge.shards.folder import (
    Header,
    Manifest,
    Shard,
    finish_shard,
    is_complete,
    shard_folder,
    shards_of,
)
from lora_merge.merge.waiting_results import Spool
from lora_merge.planning import counted
from lora_merge.printing import Report, Summary


@dataclass(frozen=True, repr=False)
class ShardReport(Report):
    """What a shard did.

    Attributes:
        shard: Which.
        out: The result that it is for.
        folder: Where its part is.
        modules: Its modules.
        found: How many of them were done already.
        missing: Shards that are not done yet.
    """

    shard: Shard
    out: Path
    folder: Path
    modules: tuple[str, ...]
    found: int
    missing: tuple[Shard, ...]

    def summary(self) -> Summary:
        """What is done and what is missing."""
        missing = ", ".join(map(str, self.missing[:8])) + (", ..." if self.missing[8:] else "")
        return Summary(
            f"Shard {self.shard}",
            (
                ("modules", f"{len(self.modules)}, {self.found} of them done before"),
                ("written to", str(self.folder)),
                ("still missing", missing or f"nothing: lora-merge join {self.out}"),
            ),
        )

    def rows(self) -> list[dict[str, Any]]:
        """One row per module."""
        return [{"module": name} for name in self.modules]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "schema": 1,
            "found": self.found,
            "shard": str(self.shard),
            "out": str(self.out),
            "folder": str(self.folder),
            "modules": list(self.modules),
            "missing": [str(shard) for shard in self.missing],
        }


@dataclass(frozen=True, eq=False)
class Work:
    """What of a shard is to be done.

    Attributes:
        plan: The plan, everything decided.
        header: What a process that plans again needs to come to the same.
        spool: Where results go.
        modules: Those that are not done.
        extras: Tensors that are not factors and are not done.
        jobs: Worker threads.
        device: Where to compute.
        step: Called after each module.
    """

    plan: MergePlan
    header: Header
    spool: Spool
    modules: tuple[AlignedModule, ...]
    extras: tuple[str, ...]
    jobs: int | None
    device: str
    step: Callable[[], None]


@takes(RunShard)
def run_shard(given: RunShard) -> ShardReport:
    """Merge one part of a recipe's modules, for `join`; the parts need to know nothing of another.

    `force` throws away what an earlier run left of this shard; `resume` goes on from it, if recipe
    and adapters are still the same.

    Returns:
        What was done, and which shards are missing.

    Raises:
        LoraMergeError: If recipe, adapters and request do not fit, if something of the shard is
            there and neither `force` nor `resume` is given, or if it is of other adapters.

    Examples:
        >>> import lora_merge
        >>> adapters = [{"adapter": "examples/adapters/*"}]
        >>> recipe = {"merge_method": "ties", "rank": 8, "adapters": adapters}
        >>> for shard in ("1/2", "2/2"):
        ...     report = lora_merge.run_shard(recipe, "sharded", shard)
        >>> report.missing
        ()
    """
    return fill_shard(given, here)


def here(work: Work) -> None:
    """Do a shard's work in this process."""
    compute(
        work.plan,
        work.spool,
        work.modules,
        extras=work.extras,
        jobs=work.jobs,
        device=work.device,
        on_module=lambda _: work.step(),
    )


def fill_shard(given: RunShard, engine: Callable[[Work], None]) -> ShardReport:
    """`run_shard`, of which an engine computes what is left, into the work's spool."""
    part, out = Shard.parse(given.shard), Path(given.out)
    plan, header = plan_for_shards(given)
    folder = part.folder(out)
    with shard_folder(folder, header, force=given.force, resume=given.resume) as complete:
        names, extras = part.of(plan)
        spool = Spool((folder,), keep=True)
        mine = set(names)
        left = [m for m in plan.alignment.modules if m.name in mine and not spool.has(m.name)]
        step = counted(given.progress, "merging", len(left))
        if given.on_plan:
            given.on_plan(PlannedMerge(plan))
        if not complete:
            rest = tuple(name for name in extras if not spool.has_extra(name))
            with ThreadPoolExecutor(1) as beside:
                hashes = beside.submit(_hashes, part, plan)
                engine(Work(plan, header, spool, tuple(left), rest, given.jobs, given.device, step))
            changed = changed_file(plan, header.facts)
            if changed:
                raise OutputError(
                    f"{changed} has changed while it was merged", "--force begins this shard again"
                )
            number = part.number, part.count
            finish_shard(
                folder, Manifest(number, header.facts.digest, names, extras, hashes.result())
            )
    every = [Shard(number, part.count) for number in range(1, part.count + 1)]
    missing = tuple(one for one in every if not is_complete(one.folder(out)))
    return ShardReport(part, out, folder, tuple(names), len(names) - len(left), missing)


def plan_for_shards(given: RunShard) -> tuple[MergePlan, Header]:
    """The plan of a merge in parts, everything decided, and what each part says of it."""
    recipe, out, allow_pickle = as_recipe(given.recipe), Path(given.out), given.allow_pickle
    check_target(out, force=given.force, inputs=inputs_of(recipe))
    plan = plan_merge(recipe, open_recipe(recipe, allow_pickle=allow_pickle))
    plan = decided(plan, shards_of(out), jobs=given.jobs, device=given.device)
    return plan, Header(facts_of(plan), recipe.to_yaml(), decision_of(plan), allow_pickle)


def planned_again(header: Header) -> MergePlan:
    """The plan that a shard's header tells of, from the adapters as they are now.

    Raises:
        LoraMergeError: If they cannot be opened, or do not fit any more.
    """
    recipe = as_recipe(parse_yaml(header.recipe, "a shard's recipe"))
    plan = plan_merge(recipe, open_recipe(recipe, allow_pickle=header.allow_pickle))
    return with_decision(plan, header.decided, "a shard's decision")


def _hashes(part: Shard, plan: MergePlan) -> dict[str, str]:
    """SHA-256 of this shard's share of the inputs, for the result's recipe: each is read once."""
    sources = {a.name: a.source for a in plan.alignment.adapters if a.source}
    mine = sorted(sources)[part.number - 1 :: part.count]
    return {name: sources[name].digest for name in mine}
