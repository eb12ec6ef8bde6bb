"""Tuners that change few entries or columns: exact while these are few, else of full rank."""

from functools import partial

import torch
from torch import Tensor

from lora_merge.adapters.dialects.full_rank.asked import refuse_unasked
from lora_merge.adapters.dialects.grouping import Group
from lora_merge.adapters.dialects.recipes.selection import columns_of, entries_of
from lora_merge.adapters.dialects.recipes.units import Units, joined, precise, product, scaled
from lora_merge.adapters.dialects.tuners.settings import Settings
from lora_merge.adapters.forms import ModuleSpec
from lora_merge.adapters.units import BaseWeight


def shira(group: Group, settings: Settings) -> ModuleSpec:
    """SHiRA: entries at stored places."""
    (count,) = group.shape("shira_weight", 1)
    group.check(group.shape("shira_indices") == (2, count))
    d_out, d_in = settings.base_shape(group)
    rank = _rank(group, "SHiRA", count, (d_out, d_in))
    units = partial(_shira, (d_out, d_in), rank)
    parts = ("shira_weight", "shira_indices")
    return group.spec(parts, units, d_out=d_out, d_in=d_in, rank=rank)


def _shira(shape: tuple[int, int], rank: int, values: Tensor, index: Tensor) -> Units:
    return _filled(entries_of(values, index[0].long(), index[1].long(), shape), rank)


def supertuning(group: Group, settings: Settings) -> ModuleSpec:
    """Super-Tuning: entries at stored places of the flattened weight; Supra: a LoRA beside them."""
    (count,) = group.shape("supertuning_values", 1)
    if "supertuning_indices" not in group:
        settings.refuse(
            "the places of its entries are not in the file, and come from the base's magnitudes",
            "load it in PEFT and save it again with save_precomputed_indices=True",
        )
    group.check(group.shape("supertuning_indices") == (count,))
    d_out, d_in = settings.base_shape(group)
    rank = _rank(group, "Super-Tuning", count, (d_out, d_in))
    parts: tuple[str, ...] = ("supertuning_values", "supertuning_indices")
    r = 0
    if "supertuning_lora_A.weight" in group:
        r = group.shape("supertuning_lora_A.weight", 2)[0]
        group.check(group.shape("supertuning_lora_A.weight") == (r, d_in))
        group.check(group.shape("supertuning_lora_B.weight") == (d_out, r))
        parts += ("supertuning_lora_A.weight", "supertuning_lora_B.weight")
    scaling = settings.config.lora_alpha / r if r else 1.0
    units = partial(_supertuning, (d_out, d_in), rank, scaling)
    return group.spec(parts, units, d_out=d_out, d_in=d_in, rank=rank + r)


def _supertuning(
    shape: tuple[int, int],
    rank: int,
    scaling: float,
    values: Tensor,
    places: Tensor,
    *factors: Tensor,
) -> Units:
    flat = places.long()
    units = _filled(entries_of(values, flat // shape[1], flat % shape[1], shape), rank)
    return joined([units, scaled(product(*factors), scaling)]) if factors else units


def paca(group: Group, settings: Settings) -> ModuleSpec:
    """PaCA: r columns of W in the place of its own; s w - W there (arXiv 2503.01905).

    Key names of WooSunghyeon/paca, a fork of PEFT: `paca_w` (d_out, r), `paca_indices` (r,).
    """
    if "paca_indices" not in group:
        group.refuse(
            "which columns it trains is not in the file, and was drawn at random",
            "save it with its buffer paca_indices",
        )
    d_out, r = group.shape("paca_w", 2)
    group.check(group.shape("paca_indices") == (r,))
    rows, d_in = settings.base_shape(group)
    group.check(rows == d_out and r <= d_in)
    alpha = settings.said("paca_alpha")
    if alpha is None:
        group.refuse("paca_alpha is not in adapter_config.json", "put it there")
    return group.spec(
        ("paca_w", "paca_indices"),
        partial(_paca, alpha / r, d_in),
        d_out=d_out,
        d_in=d_in,
        rank=r,
        verdict="exact-with-base",
        needs_base=True,
    )


def _paca(scaling: float, d_in: int, columns: Tensor, index: Tensor, *, base: BaseWeight) -> Units:
    index = index.long()
    chosen = torch.zeros(d_in, len(index))
    chosen[index, torch.arange(len(index))] = 1
    return columns_of(scaling * precise(columns) - base.times(chosen), index, d_in)


def _rank(group: Group, title: str, count: int, shape: tuple[int, int]) -> int:
    """An upper bound from headers alone; refuses one near full rank that nobody asked for."""
    rank = min(count, *shape)
    if 4 * rank > min(shape):
        refuse_unasked(group, f"{title} changes {count} entries all over the weight")
    return rank


def _filled(units: Units, rank: int) -> Units:
    """Zero units up to a rank: the header does not tell how many rows or columns are touched."""
    missing = rank - units.rank
    a = torch.cat([units.a, units.a.new_zeros(missing, units.a.shape[1])])
    return Units(a, torch.cat([units.b, units.b.new_zeros(len(units.b), missing)], dim=1))
