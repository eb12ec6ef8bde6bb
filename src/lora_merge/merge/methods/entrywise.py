"""Elementwise rules as merge methods, in any space: delta, aligned (KnOTS), core, factors."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from threading import Lock
from typing import Any, Literal

import torch
from torch import Tensor

from lora_merge.adapters.rank_stack import RankStack
from lora_merge.errors import MethodError
from lora_merge.linalg.random_bits import mask_key
from lora_merge.merge.elementwise.bands import blocks_of
from lora_merge.merge.elementwise.blocks import Block, Statistics
from lora_merge.merge.elementwise.combine import measure, merge_tensor
from lora_merge.merge.elementwise.delta import merge_delta
from lora_merge.merge.elementwise.rule import (
    Compat,
    Rule,
    Scope,
    preset,
    unseen,
    without_effect,
)
from lora_merge.merge.elementwise.thresholds import brackets_of, sample_entries
from lora_merge.merge.methods.method import Job, Method, Outcome, Survey, equal_ranks
from lora_merge.merge.recipe.recipe import Space
from lora_merge.options import option

# One entry of so many is sampled to guess the thresholds of all modules together, but no fewer of a
# module than; with fewer than the last number in all, a guess is not worth making.
_SAMPLED_SHARE = 1 << 12
_LEAST_SAMPLE = 64
_LEAST_SAMPLES = 1 << 11


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


def rule_of(name: str, options: EntryOptions, own: Sequence[Mapping[str, Any]] = ()) -> Rule:
    """The elementwise rule that these options mean.

    Args:
        name: Name of the rule.
        options: Changes to it.
        own: Further changes for single adapters, by owner.
    """
    values = {f.name: getattr(options, f.name) for f in fields(options) if f.name != "compat"}
    changes = {field: value for field, value in values.items() if value is not None}
    rule = preset(name, compat=options.compat, **changes)
    for field, value in changes.items():
        if needed := without_effect(rule, field):
            raise MethodError(
                f"{field} is {value!r}, which changes nothing here: it needs {needed}",
                "leave it out",
            )
    if not any(own):
        return rule
    return replace(rule, own=tuple(replace(rule, **parameters) for parameters in own))


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
    rule = rule_of(name, options, job.own)
    if job.space == "factors":
        return _on_factors(rule, stack, job)
    merged = merge_delta(
        stack,
        rule,
        job.weights,
        rank=job.rank if job.space == "delta" else None,
        keys=_keys(rule, job),
        seed=job.seed,
        statistics=job.shared,
    )
    return Outcome(merged.stack, energy=merged.retained)


def measure_entries(name: str, survey: Survey, options: EntryOptions) -> Statistics | None:
    """What a rule of scope "global" must know of all modules; None for other rules.

    Args:
        name: Name of the rule.
        survey: Goes through every module's stack and job.
        options: Changes to the rule.

    Raises:
        MethodError: If the space or the parameters leave a global ranking without a meaning.
    """
    rule = rule_of(name, options)
    if rule.scope != "global":
        return None
    rules, samples = _look_ahead(name, survey, options)
    rule = rules.pop()
    if rules:
        raise MethodError(
            "scope global ranks the entries of all modules together, but density (or gamma, trim) "
            "differs from module to module",
            "use -p scope=tensor, or one value for all modules",
        )
    if not rule.needs_statistics:
        return None

    def sweep(visit: Callable[[Block], None]) -> None:
        def take(stack: RankStack, job: Job) -> None:
            for block in _blocks(rule, stack, job):
                visit(block)

        survey(take)

    brackets = {
        owner: brackets_of(rule, owner, sample)
        for owner, parts in samples.items()
        if len(sample := torch.cat(parts)) >= _LEAST_SAMPLES
    }
    return measure(rule, sweep, max(samples, default=0) + 1, brackets=brackets)


def _look_ahead(
    name: str, survey: Survey, options: EntryOptions
) -> tuple[set[Rule], dict[int, list[Tensor]]]:
    """The rules of all modules, and a sample of each adapter's magnitudes, by owner."""
    rules: set[Rule] = set()
    samples: dict[int, list[Tensor]] = {}
    lock = Lock()

    def take(stack: RankStack, job: Job) -> None:
        if job.space == "factors":
            raise MethodError("scope global has no meaning for factors", "use --param scope=tensor")
        rule = rule_of(name, options, job.own)
        size = stack.d_out * stack.d_in
        size = min(max(size // _SAMPLED_SHARE, _LEAST_SAMPLE), size)
        found = sample_entries(rule, stack, size) if rule.needs_thresholds else {}
        with lock:
            rules.add(rule)
            for owner in stack.adapters:
                parts = samples.setdefault(owner, [])
                if float(job.weights[owner]) != 0 and owner in found:
                    parts.append(found[owner])

    survey(take)
    return rules, samples


def _blocks(rule: Rule, stack: RankStack, job: Job) -> Iterator[Block]:
    weights = job.weights.tolist()
    if any(weights[owner] != 0 for owner in stack.adapters):
        yield from blocks_of(stack, weights, keys=_keys(rule, job), rule=rule)()


def _keys(rule: Rule, job: Job, part: str = "") -> list[int]:
    """Each adapter's mask key in this module: what it stores there decides, not what it is called.

    Adapters that store the same are told apart by their weights, then by their order.
    """
    source = job.source
    if not rule.is_random or source is None:
        return [0] * len(job.weights)
    digests = {}
    for owner in source.adapters:
        own = source.of_adapter(owner)
        content = hashlib.blake2b(digest_size=16)
        for tensor in (own.down, own.up, own.scale):
            content.update(tensor.cpu().contiguous().numpy().tobytes())
        digests[owner] = content.hexdigest()
    keys = [0] * len(job.weights)
    seen: Counter[str] = Counter()
    for owner in sorted(digests, key=lambda o: (float(job.weights[o]), o)):
        digest = digests[owner]
        keys[owner] = mask_key(job.seed, job.module + part, f"{digest} {seen[digest]}")
        seen[digest] += 1
    return keys


def _on_factors(rule: Rule, stack: RankStack, job: Job) -> Outcome:
    """PEFT's way: the rule on A and on B apart, sqrt|w s| in each, the sign in A."""
    shape = equal_ranks(
        stack, f"space factors at {job.module}", "use another space, which takes any ranks"
    )
    weight = stack.scale * job.weights[stack.owner]
    weight = torch.stack([weight[stack.owner == i][0] for i in stack.adapters])
    root = weight.abs().sqrt()
    present = list(stack.adapters)
    if rule.own:
        rule = replace(rule, own=tuple(rule.own[i] for i in present))
    keys = {part: _keys(rule, job, part) for part in (".A", ".B")}
    down = merge_tensor(
        rule,
        stack.down.unflatten(0, shape),
        (root * weight.sign()).tolist(),
        keys=[keys[".A"][i] for i in present],
    )
    up = merge_tensor(
        rule,
        stack.up.unflatten(1, shape).movedim(1, 0).contiguous(),
        root.tolist(),
        keys=[keys[".B"][i] for i in present],
    )
    return Outcome(RankStack.single(up, down))


def _row(
    name: str,
    rule: str,
    summary: str,
    paper: str,
    *,
    space: Space = "delta",
    presets: Mapping[str, Any] | None = None,
) -> Method:
    """A row for an elementwise rule in a space."""
    presets = presets or {}
    per_adapter: dict[str, tuple[str, ...]] = {
        "dare-ties": ("density", "trim"),
        "della": ("density", "epsilon"),
        "breadcrumbs": ("density", "gamma"),
        "sce": (),  # what it keeps is decided for all adapters together
    }
    costs = {"delta": "d_in d_out R, in row blocks", "aligned": "d_in R²", "core": "R³"}
    return Method(
        name=name,
        summary=summary,
        paper=paper,
        combine=partial(entries, rule),
        prepare=partial(measure_entries, rule),
        check=partial(rule_of, rule),
        per_adapter=per_adapter.get(rule, ("density",)),
        options=EntryOptions,
        ignores=unseen(rule),
        presets=presets,
        shown={**rule_defaults(rule), **presets},
        space=space,
        spaces=("delta", "aligned", "core", "factors"),
        makes_rank=True,
        full_rank_in=("delta",),
        anchored=True,
        separates=rule in ("ties", "dare-ties", "della", "sce"),  # what disagrees is erased
        cost=costs[space],
        grams=False,
    )


# The elementwise rows of the table of methods.
ROWS = (
    _row(
        "magnitude",
        "magnitude",
        "largest entries of each adapter, summed",
        "PEFT's magnitude_prune",
    ),
    _row(
        "ties",
        "ties",
        "trim small entries, elect a sign, average what agrees",
        "Yadav et al., NeurIPS 2023, arXiv 2306.01708",
    ),
    _row(
        "dare",
        "dare",
        "drop entries at random, rescale the rest, sum",
        "Yu et al., ICML 2024, arXiv 2311.03099",
    ),
    _row(
        "dare-ties",
        "dare-ties",
        "drop entries at random, rescale, then TIES",
        "Yu et al., ICML 2024, arXiv 2311.03099",
    ),
    _row(
        "della",
        "della",
        "drop by rank of magnitude in each row, rescale, elect a sign",
        "Deep et al. 2024, arXiv 2406.11617",
    ),
    _row(
        "breadcrumbs",
        "breadcrumbs",
        "drop the largest entries and the smallest, sum",
        "Davari & Belilovsky, ECCV 2024, arXiv 2312.06795",
    ),
    _row(
        "sce",
        "sce",
        "positions where adapters differ, weighted by energy, minority signs erased",
        "FuseChat, Wan et al. 2024, arXiv 2408.07990",
    ),
    _row(
        "knots-ties",
        "ties",
        "TIES in the adapters' common left singular basis",
        "KnOTS, Stoica et al., ICLR 2025, arXiv 2410.19735",
        space="aligned",
    ),
    _row(
        "knots-dare-ties",
        "dare-ties",
        "DARE-TIES in the adapters' common left singular basis",
        "KnOTS, Stoica et al., ICLR 2025, arXiv 2410.19735",
        space="aligned",
        presets={"density": 0.9},
    ),
    _row(
        "core-ties",
        "ties",
        "TIES on the R x R cores",
        "Core Space, Panariello et al., NeurIPS 2025, arXiv 2509.17786",
        space="core",
    ),
    _row(
        "core-dare-ties",
        "dare-ties",
        "DARE-TIES on the R x R cores",
        "Core Space, Panariello et al., NeurIPS 2025, arXiv 2509.17786",
        space="core",
        presets={"density": 0.9},
    ),
)
