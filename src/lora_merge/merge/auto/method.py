"""`auto`: choose a method from the adapters, and say why."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from lora_merge.adapters.aligned_module import AlignedModule
from lora_merge.adapters.alignment import Alignment, read_stacks
from lora_merge.adapters.rank_stack import RankStack

# Modules that are looked at: evenly spread, so that every depth and kind has its say.
_SAMPLE = 8
# Above this mean cosine adapters are fine-tunings of one task rather than of several.
_SAME_TASK = 0.5


@dataclass(frozen=True)
class Choice:
    """A method and the reason for it.

    Attributes:
        method: Its name.
        reason: Why, in words.
    """

    method: str
    reason: str


def choose(alignment: Alignment) -> Choice:
    """Choose a method. Reads a few modules; all else of a plan is from headers.

    Args:
        alignment: The adapters.
    """
    count = len(alignment.adapters)
    if count == 1:
        return Choice("svd", "there is one adapter")
    stacks = [stack for module in _spread(alignment.modules) for stack in _read(alignment, module)]
    if stacks and all(_share_a_factor(stack) for stack in stacks):
        return Choice("fedavg", "the adapters share A or B, so their mean is exact at their rank")
    cosine = _mean_cosine(stacks)
    if cosine > _SAME_TASK:
        return Choice("mean", f"the adapters are much alike (mean cosine {cosine:.2f})")
    tasks = f"{count} adapters of different tasks (mean cosine {cosine:.2f})"
    return Choice("wudi-iso", f"{tasks}: least squares, kept from disturbing each other's outputs")


def _spread(modules: Sequence[AlignedModule]) -> list[AlignedModule]:
    """A few modules that adapters share, from the first to the last.

    Both ends belong to it: a whole step of the list, which goes layer by layer, would be a whole
    number of layers, and so one and the same kind of module, in most models.
    """
    shared = [m for m in modules if len(m.specs) > 1]
    if len(shared) <= _SAMPLE:
        return shared
    return [shared[i * (len(shared) - 1) // (_SAMPLE - 1)] for i in range(_SAMPLE)]


def _read(alignment: Alignment, module: AlignedModule) -> list[RankStack]:
    """The module's stack; of experts, the first."""
    return list(islice(read_stacks(alignment, module), 1))


def _share_a_factor(stack: RankStack) -> bool:
    parts = [stack.of_adapter(owner) for owner in stack.adapters]
    first, others = parts[0], parts[1:]
    same_a = all(
        p.down.shape == first.down.shape and torch.equal(p.down, first.down) for p in others
    )
    same_b = all(p.up.shape == first.up.shape and torch.equal(p.up, first.up) for p in others)
    return same_a or same_b


def _mean_cosine(stacks: Sequence[RankStack]) -> float:
    """Mean cosine of pairs of deltas over the modules; pairs with a zero delta do not count."""
    cosines = []
    for stack in stacks:
        present = torch.tensor(stack.adapters)
        products = stack.adapter_products()[present][:, present]
        norms = products.diagonal().sqrt()
        upper = torch.triu_indices(len(present), len(present), 1)
        pairs = products[upper[0], upper[1]] / (norms[upper[0]] * norms[upper[1]])
        cosines += pairs[pairs.isfinite()].tolist()
    return sum(cosines) / len(cosines) if cosines else 0.0
