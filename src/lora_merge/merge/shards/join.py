"""`lora_merge.join`: the shards of a merge become the adapter that one process would have made."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lora_merge.adapters.adapter import Adapter
from lora_merge.adapters.in_memory import MadeAdapter
from lora_merge.arguments import takes
from lora_merge.errors import OutputError
from lora_merge.merge.executor import chosen_ranks
from lora_merge.merge.plan import MergePlan
from lora_merge.merge.recipe.arguments import Join
from lora_merge.merge.report import MergeReport
from lora_merge.merge.run import PlannedMerge
from lora_merge.merge.shards.facts import difference, facts_of
from lora_merge.merge.shards.folder import (
    Header,
    Shard,
    found_shards,
    is_complete,
    read_shard,
    remove_shards,
    shards_of,
)
from lora_merge.merge.shards.shard import planned_again
from lora_merge.merge.waiting_results import Spool


@takes(Join)
def join(given: Join) -> MadeAdapter[MergeReport]:
    """Put the shards of a merge together: the same bytes as one process makes.

    Ranks that depend on all results are chosen here. The adapters must be where they were: their
    headers are read again, their weights are not.

    Returns:
        The adapter, with the `report` of what the merge did to each module.

    Raises:
        OutputError: If a shard is missing, damaged, or of another merge than the others, or if
            adapters or libraries have changed since; names it. Nothing is written.

    Examples:
        >>> import lora_merge
        >>> adapters = [{"adapter": "examples/adapters/*"}]
        >>> recipe = {"merge_method": "svd", "rank": 8, "adapters": adapters}
        >>> for shard in ("1/2", "2/2"):
        ...     report = lora_merge.run_shard(recipe, "joined", shard)
        >>> lora_merge.join("joined").report.total().rank
        (8, 8)
    """
    out = Path(given.out)
    shards = _complete(out)
    headers, manifests = zip(*(read_shard(shard.folder(out)) for shard in shards), strict=True)
    _refuse_mixture(shards, headers)
    plan = planned_again(headers[0])
    folders = tuple(shard.folder(out) for shard in shards)
    changed = difference(facts_of(plan), headers[0].facts)
    if changed:
        raise OutputError(
            f"the shards in {shards_of(out)} are of another state of things: {changed}",
            "bring it back, or run the shards again with --force",
        )
    spool = Spool(folders, keep=True)
    _refuse_holes(plan, spool, out)
    plan = _with_hashes(plan, {k: v for one in manifests for k, v in one.sha256.items()})
    if plan.measured:
        plan = plan.with_ranks(chosen_ranks(plan, spool), spool)
    plan = replace(plan, spool=spool)
    planned = PlannedMerge(plan, given.strict)
    if given.on_plan:
        given.on_plan(planned)
    made = planned.run(
        out, force=given.force, jobs=given.jobs, device="cpu", progress=given.progress
    )
    if not given.keep:
        remove_shards(out)
    return made


def _complete(out: Path) -> list[Shard]:
    """All shards of a result, in order.

    Raises:
        OutputError: Naming those that are missing or not done.
    """
    found = found_shards(out)
    if not found:
        raise OutputError(
            f"there are no shards for {out} ({shards_of(out)})",
            f"make them: lora-merge merge ... -o {out} --shard 1/4, 2/4, ...",
        )
    counts = sorted({shard.count for shard in found})
    if len(counts) > 1:
        raise OutputError(
            f"{shards_of(out)} holds shards of {' and of '.join(map(str, counts))}",
            "delete those that are not wanted",
        )
    every = [Shard(number, counts[0]) for number in range(1, counts[0] + 1)]
    missing = [str(shard) for shard in every if not is_complete(shard.folder(out))]
    if missing:
        names = ", ".join(missing[:6]) + (f" and {len(missing) - 6} more" if missing[6:] else "")
        raise OutputError(
            f"of the shards for {out}, {names} are not done",
            f"run each again with its --shard, e.g. --shard {missing[0]} --resume",
        )
    return every


def _refuse_mixture(shards: Sequence[Shard], headers: Sequence[Header]) -> None:
    for shard, header in zip(shards[1:], headers[1:], strict=True):
        found = difference(header.facts, headers[0].facts)
        if found:
            raise OutputError(
                f"shard {shard} is of another merge than shard {shards[0]}: {found}",
                f"run one of the two again: --shard {shard} --force",
            )


def _refuse_holes(plan: MergePlan, spool: Spool, out: Path) -> None:
    missing = [m.name for m in plan.alignment.modules if not spool.has(m.name)]
    missing += [name for name in plan.extras if not spool.has_extra(name)]
    if missing:
        raise OutputError(
            f"no shard in {shards_of(out)} holds {missing[0]} ({len(missing)} are missing)",
            "run the shards again with --force",
        )


def _with_hashes(plan: MergePlan, hashes: Mapping[str, str]) -> MergePlan:
    """The plan with what the shards found to be its adapters' SHA-256."""

    def known(adapter: Adapter) -> Adapter:
        if adapter.source is None or adapter.name not in hashes:
            return adapter
        return replace(adapter, source=replace(adapter.source, sha256=hashes[adapter.name]))

    adapters = tuple(known(adapter) for adapter in plan.alignment.adapters)
    return replace(
        plan,
        given=tuple(known(adapter) for adapter in plan.given),
        alignment=replace(plan.alignment, adapters=adapters),
    )
