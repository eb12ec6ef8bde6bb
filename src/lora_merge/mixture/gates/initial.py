"""The gate tensors a mixture starts with: exact prototypes, or seeded rows that training moves.

Names: `<module>.prototype`, `<module>.weight`, `<module>.rank_bias` with the module's path in the
base model, and `classifier.<j>.weight|bias` for X-LoRA.
"""

import math
import zlib
from collections.abc import Collection, Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from lora_merge.adapters.alignment import Alignment, read_stacks
from lora_merge.adapters.rank_stack import RankStack
from lora_merge.errors import MethodError
from lora_merge.mixture.gates.gate import GateSpec
from lora_merge.mixture.gates.text_index import empty_gate

_WIDEST = 1 << 20  # a hidden state
_READS_HIDDEN = ("q_proj", "query", "q_lin", "query_key_value", "c_attn", "qkv", "gate_proj")


def initial_gate(
    alignment: Alignment,
    spec: GateSpec,
    num_experts: int,
    *,
    seed: int = 0,
    hidden_size: int | None = None,
    only: Collection[int] | None = None,
) -> dict[str, Tensor]:
    """Gate tensors of a new mixture, float32.

    Args:
        alignment: The gated experts first, then the general ones.
        spec: The gate.
        num_experts: How many of the adapters are gated.
        seed: Of the rows that are drawn; a module's rows depend on its name, not on its place.
        hidden_size: Width of the classifier's input (`hidden`); default: read off the modules.
        only: Experts whose prototypes are wanted; default: all.
    """
    if spec.signal == "hidden":
        width = _width(alignment, hidden_size)
        outputs = num_experts + int(spec.null_expert)
        if spec.granularity == "module":
            outputs *= len(alignment.modules)
        return classifier_tensors(spec, width, outputs, seed)
    if spec.signal == "text":
        return empty_gate(num_experts, _width(alignment, hidden_size))
    tensors: dict[str, Tensor] = {}
    if not spec.has_rows:
        return tensors
    for module in alignment.modules:
        present = [index for index in module.specs if index < num_experts]
        if not present:
            continue
        if spec.signal == "prototype":
            wanted = present if only is None else [index for index in present if index in only]
            if wanted:
                general = len(alignment.adapters) - num_experts
                used = [i for i in module.specs if i in wanted or i >= num_experts]
                stack = next(iter(read_stacks(alignment, module.restricted(used))))
                rows = prototypes(stack, wanted, num_experts, general)
                tensors[f"{module.name}.prototype"] = rows
            continue
        ranks = sum(module.specs[index].rank for index in present)
        count = ranks if spec.granularity == "rank" else len(present) + int(spec.null_expert)
        width = module.first.d_in
        if spec.standardise:  # sigmoid(0): every expert half open, PHATGOOSE's start
            tensors[f"{module.name}.weight"] = torch.zeros(count, width)
        else:
            tensors[f"{module.name}.weight"] = _uniform(count, width, module.name, seed)
        if spec.granularity == "rank":
            tensors[f"{module.name}.rank_bias"] = torch.zeros(count)
    return tensors


def prototypes(
    stack: RankStack, present: Sequence[int], num_experts: int, num_general: int = 0
) -> Tensor:
    """Top right singular vector of each expert's delta, exact, shape (E, d_in), float32.

    With general experts (GenKnowSub, arXiv 2505.10939) of each delta minus their mean; the
    subtraction is a concatenation of factors, so nothing is averaged and nothing is approximated.
    """
    weights = torch.ones(num_experts + num_general, dtype=torch.float64, device=stack.owner.device)
    weights[num_experts:] = -1.0 / max(num_general, 1)
    vectors = []
    for owner in present:
        part = stack.units((stack.owner == owner) | (stack.owner >= num_experts)).weighted(weights)
        _, _, vh = part.svd()
        vectors.append(vh[0])
    return torch.stack(vectors)


def svd_form(stack: RankStack, owners: Iterable[int]) -> tuple[RankStack, Tensor]:
    """The same deltas with each expert's units its singular pairs: down = V^T, up = U S.

    Returns:
        The stack (scale 1) and the singular value of every unit, float64, shape (R,).
    """
    parts, values = [], []
    for owner in owners:
        part = stack.of_adapter(owner)
        u, s, vh = part.svd()
        parts.append(RankStack(vh, u * s.to(u.dtype), torch.ones_like(s), part.owner[: len(s)]))
        values.append(s)
    return RankStack.joined(parts), torch.cat(values)


def classifier_tensors(spec: GateSpec, width: int, outputs: int, seed: int) -> dict[str, Tensor]:
    """Weights and biases of X-LoRA's classifier as nn.Linear draws them, seeded."""
    sizes = [width, *[spec.width] * (spec.depth - 1), outputs]
    tensors = {}
    for index, (before, after) in enumerate(pairwise(sizes)):
        name = f"classifier.{index}"
        tensors[f"{name}.weight"] = _uniform(after, before, name, seed)
        bias = _uniform(after, before, f"{name}.bias", seed)[:, 0]
        tensors[f"{name}.bias"] = bias.clone()
    return tensors


def _uniform(rows: int, width: int, name: str, seed: int) -> Tensor:
    """Uniform in +-1 / sqrt(width), as nn.Linear starts."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) ^ (seed * 0x9E3779B1))
    drawn = torch.rand(rows, width, generator=generator) * 2 - 1
    return drawn * (1 / math.sqrt(width))


def _width(alignment: Alignment, given: int | None) -> int:
    """Width of the model's hidden state, as given or as the modules tell."""
    if given is not None and not 1 <= given <= _WIDEST:
        raise MethodError(f"a hidden state of {given} numbers", f"from 1 to {_WIDEST}")
    return given or _hidden_size(alignment)


def _hidden_size(alignment: Alignment) -> int:
    for module in alignment.modules:
        if module.name.rpartition(".")[2] in _READS_HIDDEN:
            return module.first.d_in
    raise MethodError(
        "the adapters do not tell the width of the model's hidden state",
        "give hidden_size (--hidden-size), config.json of the base model has it",
    )
