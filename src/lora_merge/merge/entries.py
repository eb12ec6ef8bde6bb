"""Elementwise rules as merge methods, in any space: delta, aligned (KnOTS), core, factors."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch

from lora_merge.adapters import RankStack
from lora_merge.errors import MethodError
from lora_merge.merge.blocks import Block, Statistics
from lora_merge.merge.delta import merge_delta, sweep_of
from lora_merge.merge.elementwise import measure, merge_tensor
from lora_merge.merge.masks import mask_key
from lora_merge.merge.method import Job, Outcome, Sweep, single
from lora_merge.merge.options import option
from lora_merge.merge.rule import Compat, Rule, Scope, preset


@dataclass(frozen=True)
class EntryOptions:
    """Parameters of elementwise methods; None is what the method (as `compat` has it) says."""

    density: float | None = option(None, "share of entries that is kept", low=0, high=1)
    gamma: float | None = option(None, "share of largest entries dropped", low=0, high=1)
    epsilon: float | None = option(
        None, "della: keep probabilities run from density - epsilon to + epsilon", low=0, high=1
    )
    trim: float | None = option(
        None, "share of largest entries kept after random dropping", low=0, high=1
    )
    compat: Compat = option("authors", "whose code to agree with where they differ")
    scope: Scope | None = option(
        None, "rank magnitudes within a row, a module, or all modules together"
    )
    rescale: Literal["none", "probability", "l1"] | None = option(
        None, "what makes up for dropped entries"
    )
    elect: Literal["none", "total", "frequency"] | None = option(
        None, "sign election by sums or by counts"
    )
    elect_on: Literal["unweighted", "weighted"] | None = option(
        None, "elect on the adapters' entries or on weight times entry"
    )
    zero_sign: Literal["majority", "plus"] | None = option(None, "sign where the election is a tie")
    divide_by: Literal["none", "count", "weights", "abs-weights"] | None = option(
        None, "what the sum over agreeing adapters is divided by"
    )


def rule_of(name: str, options: EntryOptions) -> Rule:
    """The elementwise rule that these options mean."""
    changes = {f.name: getattr(options, f.name) for f in fields(options) if f.name != "compat"}
    return preset(name, compat=options.compat, **changes)


def rule_defaults(name: str) -> dict[str, Any]:
    """What the options of a method are unless given, for help texts."""
    rule = preset(name)
    return {f.name: getattr(rule, f.name, "authors") for f in fields(EntryOptions)}


def entries(name: str, stack: RankStack, job: Job, options: EntryOptions) -> Outcome:
    """Merge entry by entry in the space that the stack is in.

    Args:
        name: Name of the rule.
        stack: The adapters; in aligned or core space, in those coordinates.
        job: `job.shared` holds the statistics of all modules, for scope "global".
        options: Changes to the rule.
    """
    rule = rule_of(name, options)
    if job.space == "factors":
        return _on_factors(rule, stack, job)
    # Sparsified deltas have full rank; more than the R units that went in is never written.
    rank = (job.rank or stack.num_units) if job.space == "delta" else None
    merged = merge_delta(
        stack,
        rule,
        job.weights,
        rank=rank,
        keys=_keys(job),
        seed=job.seed,
        statistics=job.shared,
    )
    return Outcome(merged.stack, energy=merged.retained)


def measure_entries(name: str, sweep: Sweep, options: EntryOptions) -> Statistics | None:
    """What a rule of scope "global" must know of all modules; None for other rules.

    Args:
        name: Name of the rule.
        sweep: Yields every module's stack and job.
        options: Changes to the rule.
    """
    rule = rule_of(name, options)
    if rule.scope != "global" or not rule.needs_statistics:
        return None

    def blocks() -> Iterator[Block]:
        for stack, job in sweep():
            weights = job.weights.tolist()
            if job.space == "factors":
                raise MethodError(
                    "scope global has no meaning for factors", "use --param scope=tensor"
                )
            if any(weights[owner] != 0 for owner in stack.adapters):
                yield from sweep_of(stack, weights, keys=_keys(job), rule=rule)()

    _, first = next(iter(sweep()))
    return measure(rule, blocks, len(first.weights))


def _keys(job: Job) -> list[int]:
    return [mask_key(job.seed, job.module, name) for name in job.names]


def _on_factors(rule: Rule, stack: RankStack, job: Job) -> Outcome:
    """PEFT's way: the rule on A and on B apart, sqrt|w s| in each, the sign in A."""
    ranks = [int((stack.owner == i).sum()) for i in stack.adapters]
    if len(set(ranks)) > 1:
        raise MethodError(
            f"space factors at {job.module}: the ranks differ: {', '.join(map(str, ranks))}",
            "use another space, which takes any ranks",
        )
    shape = (len(ranks), ranks[0])
    weight = stack.scale * job.weights[stack.owner]
    weight = torch.stack([weight[stack.owner == i][0] for i in stack.adapters])
    root = weight.abs().sqrt()
    names = [job.names[i] for i in stack.adapters]
    down = merge_tensor(
        rule,
        stack.down.unflatten(0, shape),
        (root * weight.sign()).tolist(),
        keys=[mask_key(job.seed, job.module + ".A", name) for name in names],
    )
    up = merge_tensor(
        rule,
        stack.up.unflatten(1, shape).movedim(1, 0).contiguous(),
        root.tolist(),
        keys=[mask_key(job.seed, job.module + ".B", name) for name in names],
    )
    return Outcome(single(up, down))
