"""Experts that exist in memory alone, from factors that were computed: plain LoRA adapters."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lora_merge.adapters.adapter import Adapter
from lora_merge.adapters.alignment import read_stacks
from lora_merge.adapters.in_memory import MemoryWriter
from lora_merge.adapters.rank_stack import RankStack
from lora_merge.adapters.writer import plan_output
from lora_merge.mixture.expert import Expert
from lora_merge.mixture.mixture import Mixture


def plain_adapter(
    mixture: Mixture, sources: Sequence[Adapter], parts: Mapping[str, RankStack], name: str
) -> Adapter:
    """An adapter in memory, float32, whose scaling is 1 in every module.

    Args:
        mixture: Where its modules are known from.
        sources: The adapters it is made from: they decide what its config says besides.
        parts: Module → the units it gets there.
        name: What to call it.
    """
    modules = [module for module in mixture.alignment.modules if module.name in parts]
    plan = plan_output(
        sources,
        modules,
        {module: part.num_units for module, part in parts.items()},
        dtype="F32",
        layout="per-module",
        base_model=mixture.alignment.base_model,
    )
    writer = MemoryWriter(plan)
    for module, part in parts.items():
        writer.add(module, [part], balance=False)
    return writer.adapter(name)


def rebuilt_experts(mixture: Mixture, factors: Mapping[str, tuple[Tensor, Tensor]]) -> list[Expert]:
    """Experts with other factors; units that add nothing are left out, unless ranks are gated.

    An expert keeps one unit, if an empty one, in every module it had: there its gate's row goes on
    to mean "nothing", and the weights of the others stay what they were. A gate over ranks keeps
    all, as each has a row of its own.

    Args:
        mixture: What there is.
        factors: Module -> (down (R, d_in), up (R, d_out) with the scaling folded in), the units in
            the order of the module's stack; modules that are not named stay as they are.
    """
    parts: list[dict[str, RankStack]] = [{} for _ in mixture.experts]
    by_rank = mixture.spec.granularity == "rank"
    for module in mixture.alignment.modules:
        stack = next(iter(read_stacks(mixture.alignment, module)))
        if module.name in factors:
            down, up = (t.detach().float().cpu() for t in factors[module.name])
            stack = RankStack(down, up.mT, torch.ones_like(stack.scale), stack.owner)
        alive = (stack.up != 0).any(dim=0) & (stack.down != 0).any(dim=1) & (stack.scale != 0)
        for owner in module.specs:
            mine = stack.owner == owner
            kept = mine if by_rank else mine & alive
            if not bool(kept.any()):
                kept[int(mine.nonzero()[0])] = True
            parts[owner][module.name] = stack.units(kept)
    rebuilt = []
    for expert, part in zip(mixture.experts, parts, strict=True):
        adapter = plain_adapter(mixture, [expert.adapter], part, expert.name)
        rebuilt.append(replace(expert, adapter=adapter, sha256=""))
    return rebuilt
