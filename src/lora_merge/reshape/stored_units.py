"""Keep some of an adapter's units as they are stored, without an SVD.

Two kinds of adapters are trained for it: DyLoRA (arXiv 2210.07558), whose first k units are an
adapter of rank k, and those with gates (AdaLoRA, arXiv 2303.10512; SoRA, arXiv 2311.11696), whose
units of gate zero add nothing.
"""

from collections.abc import Mapping
from math import sqrt

import torch
from torch import Tensor

from lora_merge.adapters.adapter import Adapter
from lora_merge.adapters.forms import to_matrix
from lora_merge.adapters.measured.spectra import AdapterSpectra
from lora_merge.adapters.rank_stack import RankStack
from lora_merge.ranks.choose import ModuleRank, RankPlan
from lora_merge.ranks.rule import RankRule

NESTED, PRUNE_GATES = "nested", "prune-gates"


def nested_plan(adapter: Adapter, spectra: AdapterSpectra, ranks: Mapping[str, int]) -> RankPlan:
    """Keep each module's first stored units, as DyLoRA trains them to be cut.

    The energy is one minus the squared relative error; where the rest cancels what is kept it would
    be negative, and 0 is said.

    Args:
        adapter: The adapter.
        spectra: Its spectra.
        ranks: Module → units to keep.
    """
    return _plan(adapter, spectra, RankRule(NESTED, max(ranks.values())), ranks)


def prune_plan(adapter: Adapter, spectra: AdapterSpectra, *, min_rank: int = 1) -> RankPlan:
    """Keep the units that add something: lossless.

    A unit adds nothing if its gate, its row of A or its column of B is zero.

    Args:
        adapter: The adapter.
        spectra: Its spectra.
        min_rank: Smallest rank; 0 lets a module without any such unit be dropped.
    """
    ranks = {name: max(int(_alive(adapter, name).sum()), min_rank) for name in spectra.ranks}
    return _plan(adapter, spectra, RankRule(PRUNE_GATES), ranks)


def keeps_stored_units(rule: RankRule) -> bool:
    """Whether a plan of this rule keeps units as stored."""
    return rule.kind in (NESTED, PRUNE_GATES)


def split_units(
    adapter: Adapter, name: str, rule: RankRule, rank: int
) -> tuple[list[RankStack], list[RankStack]]:
    """The units of a module that stay and those that go, float32, one stack per expert."""
    order = torch.arange(adapter.modules[name].rank)
    if rule.kind == PRUNE_GATES:
        alive = _alive(adapter, name)
        order = torch.cat([order[alive], order[~alive]])
    return _units(adapter, name, order[:rank]), _units(adapter, name, order[rank:])


def _plan(
    adapter: Adapter, spectra: AdapterSpectra, rule: RankRule, ranks: Mapping[str, int]
) -> RankPlan:
    modules = {}
    for name, before in spectra.ranks.items():
        total = float(spectra.by_module[name].square().sum())
        lost = sum(s.inner(s) for s in split_units(adapter, name, rule, ranks[name])[1])
        energy = max(1 - lost / total, 0.0) if total > 0 else 1.0
        modules[name] = ModuleRank(before, ranks[name], energy, spectra.costs[name], sqrt(total))
    return RankPlan(rule, modules)


def _alive(adapter: Adapter, name: str) -> Tensor:
    """Which units have a row of A and a column of B that are not zero, bool, shape (r,)."""
    spec = adapter.modules[name]
    a, b = adapter.read(name)
    halves = [to_matrix(spec, a, b, expert) for expert in range(spec.num_experts)]
    return torch.stack([down.any(1) & up.any(0) for down, up in halves]).any(0)


def _units(adapter: Adapter, name: str, index: Tensor) -> list[RankStack]:
    spec = adapter.modules[name]
    a, b = adapter.read(name)
    stacks = []
    for expert in range(spec.num_experts):
        down, up = to_matrix(spec, a, b, expert)
        stacks.append(RankStack.of([(down[index].float(), up[:, index].float(), spec.scaling)]))
    return stacks
