"""Experts that exist in memory alone, from factors that were computed: plain LoRA adapters."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lora_merge.adapters import (
    Adapter,
    AdapterConfig,
    ModuleSpec,
    RankStack,
    TensorDict,
    build_adapter,
    read_stacks,
)
from lora_merge.adapters.modules import to_stored
from lora_merge.mixture.mixture import Expert, Mixture


def stored_factors(spec: ModuleSpec, part: RankStack) -> dict[str, Tensor]:
    """A module's A and B as PEFT names and shapes them; scaling 1."""
    a, b = to_stored(replace(spec, rank=part.num_units), [part.balanced()], part.num_units)
    stem = f"base_model.model.{spec.name}.lora_"
    if spec.form == "embedding":
        return {stem + "embedding_A": a, stem + "embedding_B": b}
    return {stem + "A.weight": a, stem + "B.weight": b}


def plain_adapter(mixture: Mixture, tensors: dict[str, Tensor], name: str) -> Adapter:
    """An adapter in memory whose scaling is 1 in every module."""
    ranks = {
        key.removeprefix("base_model.model.").rsplit(".lora_", 1)[0]: len(tensor)
        for key, tensor in tensors.items()
        if key.endswith(("lora_A.weight", "lora_embedding_A"))
    }
    first = mixture.experts[0].adapter.config
    pattern = {"^" + module.replace(".", r"\."): rank for module, rank in ranks.items()}
    config = AdapterConfig(
        base_model=mixture.alignment.base_model,
        r=max(ranks.values()),
        lora_alpha=max(ranks.values()),
        rank_pattern=pattern,
        alpha_pattern={key: float(rank) for key, rank in pattern.items()},
        target_modules=tuple(ranks),
        fan_in_fan_out=first.fan_in_fan_out,
        task_type=first.task_type,
    )
    return build_adapter(name, config, TensorDict(tensors))


def rebuilt_experts(mixture: Mixture, factors: Mapping[str, tuple[Tensor, Tensor]]) -> list[Expert]:
    """Experts with other factors; units that add nothing are left out.

    An expert keeps one unit, if an empty one, in every module it had: there its gate's row goes on
    to mean "nothing", and the weights of the others stay what they were.

    Args:
        mixture: What there is.
        factors: Module -> (down (R, d_in), up (R, d_out) with the scaling folded in), the units in
            the order of the module's stack; modules that are not named stay as they are.
    """
    tensors: list[dict[str, Tensor]] = [{} for _ in mixture.experts]
    for module in mixture.alignment.modules:
        stack = next(iter(read_stacks(mixture.alignment, module)))
        if module.name in factors:
            down, up = (t.detach().float().cpu() for t in factors[module.name])
            stack = RankStack(down, up.mT, torch.ones_like(stack.scale), stack.owner)
        alive = (stack.up != 0).any(dim=0) & (stack.down != 0).any(dim=1) & (stack.scale != 0)
        for owner in module.specs:
            mine = stack.owner == owner
            kept = mine & alive
            if not bool(kept.any()):
                kept[int(mine.nonzero()[0])] = True
            tensors[owner].update(stored_factors(module.specs[owner], stack.units(kept)))
    return [
        replace(expert, adapter=plain_adapter(mixture, part, expert.name), sha256="")
        for expert, part in zip(mixture.experts, tensors, strict=True)
    ]
