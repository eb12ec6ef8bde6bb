"""Tuners whose delta has full rank: read on request alone, to be cut with the error told.

Each gives all its units, so that whoever cuts them knows what is lost.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lora_merge.adapters.dialects.full_rank import asked
from lora_merge.adapters.dialects.full_rank.asked import refuse_unasked
from lora_merge.adapters.dialects.full_rank.dora import dora as rescaled
from lora_merge.adapters.dialects.grouping import Group
from lora_merge.adapters.dialects.recipes.units import precise
from lora_merge.adapters.dialects.tuners.settings import Settings
from lora_merge.adapters.dialects.tuners.with_base import cayley, skew
from lora_merge.adapters.forms import ModuleSpec
from lora_merge.adapters.units import BaseWeight
from lora_merge.errors import AdapterError


def dense_spec(
    group: Group,
    settings: Settings,
    why: str,
    parts: tuple[str, ...],
    delta: Callable[..., Tensor],
    shape: tuple[int, int],
    *,
    needs_base: bool,
) -> ModuleSpec:
    """`asked.dense_spec` of a layer that is no Conv1D."""
    spec = asked.dense_spec(group, why, parts, delta, shape, needs_base=needs_base)
    if settings.config.fan_in_fan_out:
        group.refuse(f"{why}, of a Conv1D", "leave this adapter out")
    return spec


def ia3(group: Group, settings: Settings) -> ModuleSpec:
    """IA3: rows or columns of W times a vector."""
    why = "IA3 scales the base weight"
    refuse_unasked(group, why)
    shape = settings.base_shape(group)
    rows, columns = group.shape("ia3_l", 2)
    group.check((rows, columns) in ((shape[0], 1), (1, shape[1])))
    if columns == 1:
        settings.refuse_bias(group, "IA3 scales the bias of the base, too")
    return dense_spec(group, settings, why, ("ia3_l",), _ia3, shape, needs_base=True)


def _ia3(scale: Tensor, *, base: BaseWeight) -> Tensor:
    return base.dense() * (precise(scale) - 1)


def hira(group: Group, settings: Settings) -> ModuleSpec:
    """HiRA: W times B A, entry by entry."""
    (r, d_in), (d_out, columns) = group.shape("hira_A", 2), group.shape("hira_B", 2)
    group.check(r == columns)
    parts, why = ("hira_A", "hira_B"), "HiRA multiplies the base weight entry by entry"
    return dense_spec(group, settings, why, parts, _hira, (d_out, d_in), needs_base=True)


def _hira(a: Tensor, b: Tensor, *, base: BaseWeight) -> Tensor:
    return base.dense() * (precise(b) @ precise(a))


def miss_bat(group: Group, settings: Settings) -> ModuleSpec:
    """MiSS's "bat": every r x r block of W times a block of its rows, and that block."""
    why = 'MiSS "bat" multiplies the base weight'
    refuse_unasked(group, why)
    blocks, r, columns = group.shape("miss_block", 3)
    shape = settings.base_shape(group)
    group.check(r == columns and blocks * r == shape[0] and shape[1] % r == 0)
    return dense_spec(group, settings, why, ("miss_block",), _miss_bat, shape, needs_base=True)


def _miss_bat(block: Tensor, *, base: BaseWeight) -> Tensor:
    w, block = base.dense(), precise(block)
    count, r, _ = block.shape
    cells = w.view(count, r, -1, r).transpose(1, 2)  # block of rows, of columns, row, column
    delta = cells @ block[:, None] + block[:, None]
    return delta.transpose(1, 2).reshape(w.shape)


def glora(group: Group, settings: Settings) -> ModuleSpec:
    """PEFT's GLoRA: W times A entry by entry, plus B; the paths of the bias are stored as zeros."""
    why = "GLoRA multiplies the base weight entry by entry"
    refuse_unasked(group, why)
    biased = sorted(p for p in group.keys if p[6] in "CDE" and not p.endswith(".zeros"))
    if biased:
        group.refuse(
            f"it changes the bias ({biased[0]})",
            "merge it into its base with PEFT: a LoRA has no place for the bias",
        )
    shape = settings.base_shape(group)
    paths = tuple(tuple(sorted(p for p in group.keys if p.startswith(f"glora_{x}."))) for x in "AB")
    for path in paths:
        found = [group.shape(part) for part in path]
        whole = len(found) == 2 and found[0] == (shape[0], found[0][1])
        whole = whole and found[1] == (found[0][1], shape[1])
        group.check(whole or (len(found) == 1 and found[0] in ((1,), (shape[0], 1), shape)))
    zeros = tuple(sorted(p for p in group.keys if p[6] in "CDE"))
    delta = partial(_glora, f"{group.header.adapter}: {group.module}", len(paths[0]), len(paths[1]))
    return dense_spec(
        group, settings, why, (*paths[0], *paths[1], *zeros), delta, shape, needs_base=True
    )


def _glora(where: str, of_a: int, of_b: int, *tensors: Tensor, base: BaseWeight) -> Tensor:
    if any(bool(zeros.any()) for zeros in tensors[of_a + of_b :]):
        raise AdapterError(f"{where}: its untrained paths are not zero", "save it again with PEFT")
    a, b = _path(tensors[:of_a]), _path(tensors[of_a : of_a + of_b])
    delta: Tensor = base.dense() * a + b
    return delta


def _path(tensors: tuple[Tensor, ...]) -> Tensor:
    down, *up = map(precise, tensors)
    return down @ up[0] if up else down


def oft(group: Group, settings: Settings) -> ModuleSpec:
    """OFT: W times a block-diagonal rotation of the input."""
    why = "OFT rotates the base weight"
    refuse_unasked(group, why)
    blocks, entries = group.shape("oft_R.weight", 2)
    d_out, d_in = settings.base_shape(group)
    if settings.said("block_share", False) or settings.said("coft", False):
        group.refuse("OFT with shared or constrained blocks", "merge it into its base with PEFT")
    size = round((1 + (1 + 8 * entries) ** 0.5) / 2)
    group.check(size * (size - 1) // 2 == entries and blocks * size == d_in)
    terms = None
    if settings.said("use_cayley_neumann", True):
        terms = (int(settings.said("num_cayley_neumann_terms", 5)), None)
    delta = partial(_oft, size, terms)
    return dense_spec(
        group, settings, why, ("oft_R.weight",), delta, (d_out, d_in), needs_base=True
    )


def _oft(
    size: int, terms: tuple[int, float | None] | None, weight: Tensor, *, base: BaseWeight
) -> Tensor:
    # The exact form is (I + Q)^-1 (I - Q), whose series PEFT takes with Q's sign turned.
    sign = 1.0 if terms else -1.0
    turns = [cayley(sign * skew(row, size), terms) for row in precise(weight)]
    rotation: Tensor = torch.block_diag(*turns)
    w = base.dense()
    return w @ rotation.mT - w


def dora(group: Group, settings: Settings) -> ModuleSpec:
    """DoRA: every row of W + s B A brought to a trained norm."""
    (r, d_in), (d_out, columns) = group.shape("lora_A.weight", 2), group.shape("lora_B.weight", 2)
    part = "lora_magnitude_vector"
    part = part if part in group else part + ".weight"
    group.check(r == columns and group.shape(part) == (d_out,))
    scaling = settings.config.scaling_of(group.module, r)
    parts = ("lora_A.weight", "lora_B.weight")
    plain = group.spec(parts, None, d_out=d_out, d_in=d_in, rank=r, scaling=scaling)
    spec = rescaled(group, plain, part)
    if settings.config.fan_in_fan_out:
        group.refuse("DoRA of a Conv1D", "leave this adapter out")
    return spec
