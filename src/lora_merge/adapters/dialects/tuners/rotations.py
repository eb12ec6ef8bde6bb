"""Tuners that turn the base weight, or add sums of random bases: full rank, read to be cut."""

from functools import partial

import torch
from torch import Tensor

from lora_merge.adapters.dialects.full_rank.asked import refuse_unasked
from lora_merge.adapters.dialects.grouping import Group
from lora_merge.adapters.dialects.recipes.units import precise
from lora_merge.adapters.dialects.tuners.full_rank import dense_spec
from lora_merge.adapters.dialects.tuners.settings import Settings
from lora_merge.adapters.forms import ModuleSpec
from lora_merge.adapters.units import BaseWeight
from lora_merge.errors import AdapterError


def boft(group: Group, settings: Settings) -> ModuleSpec:
    """BOFT: W times a chain of block-diagonal rotations (2311.06243), then rows times a vector."""
    why = "BOFT rotates the base weight"
    refuse_unasked(group, why)
    factors, blocks, size, columns = group.shape("boft_R", 4)
    d_out, d_in = settings.base_shape(group)
    group.check(size == columns and blocks * size == d_in)
    group.check(group.shape("boft_s") == (d_out, 1))
    # A chain regroups halves of blocks, the last of it those of 2^(factors - 1) blocks.
    group.check(factors == 1 or (size % 2 == 0 and blocks % 2 ** (factors - 1) == 0))
    parts = ("boft_R", "boft_s")
    return dense_spec(group, settings, why, parts, _boft, (d_out, d_in), needs_base=True)


def _boft(blocks: Tensor, rows: Tensor, *, base: BaseWeight) -> Tensor:
    """Cayley (I - S)(I + S)^-1 of the skew part S of each block."""
    q = precise(blocks)
    skew = (q - q.mT) / 2
    eye = torch.eye(q.shape[-1], dtype=q.dtype)
    turns = torch.linalg.solve(eye + skew, eye - skew, left=False)
    w = turned = base.dense()
    for place, turn in enumerate(turns):
        order = torch.arange(w.shape[1])
        if place:  # halves of 2^place blocks: first the even ones, then the odd ones
            half = q.shape[-1] // 2
            order = order.view(-1, 2**place, 2, half).transpose(1, 2).flatten()
        turned = turned @ torch.block_diag(*turn)[order][:, order].mT
    return turned * precise(rows) - w


def road(group: Group, settings: Settings) -> ModuleSpec:
    """RoAd: pairs of outputs turned and stretched."""
    why = "RoAd rotates the base weight"
    refuse_unasked(group, why)
    d_out, d_in = settings.base_shape(group)
    variant = settings.said("variant", "road_1")
    size = settings.said("group_size", 64)
    counts = {"road_1": d_out // 2, "road_2": d_out, "road_4": 2 * d_out}
    if variant not in counts:
        group.refuse(f"RoAd's variant {variant!r} is not known here", "update lora-merge")
    group.check(size > 0 and size % 2 == 0 and d_out % size == 0)
    group.check(group.shape("road_theta") == group.shape("road_alpha") == (counts[variant],))
    settings.refuse_bias(group, "RoAd turns the bias of the base, too")
    parts, delta = ("road_theta", "road_alpha"), partial(_road, variant, size)
    return dense_spec(group, settings, why, parts, delta, (d_out, d_in), needs_base=True)


def _road(variant: str, size: int, theta: Tensor, alpha: Tensor, *, base: BaseWeight) -> Tensor:
    """Eq. 4 of the paper: rows x cos + (the other half of the group, turned) x sin."""
    theta, alpha = precise(theta), precise(alpha)
    if variant == "road_1":
        theta, alpha = (
            v.view(-1, 1, size // 2).expand(-1, 2, -1).reshape(-1) for v in (theta, alpha)
        )
    if variant == "road_4":
        theta, alpha = theta.view(-1, 2, size), alpha.view(-1, 2, size)
        along, across = alpha[:, 0] * theta[:, 0].cos(), alpha[:, 1] * theta[:, 1].sin()
    else:
        along, across = alpha * theta.cos(), alpha * theta.sin()
    w = base.dense()
    halves = w.view(-1, 2, size // 2, w.shape[1])
    other = torch.stack([-halves[:, 1], halves[:, 0]], dim=1).reshape(w.shape)
    turned: Tensor = along.reshape(-1, 1) * w + across.reshape(-1, 1) * other
    return turned - w


def randlora(group: Group, settings: Settings) -> ModuleSpec:
    """RandLoRA: a sum of products of random bases that all modules share, each scaled."""
    why = "RandLoRA sums products of random bases"
    refuse_unasked(group, why)
    (r, count), (rows, small) = group.shape("randlora_lambda", 2), group.shape("randlora_gamma", 2)
    d_out, d_in = settings.base_shape(group)
    group.check(rows == count and small == min(d_out, d_in))
    remedy = "save it in PEFT with save_projection=True"
    shared = tuple(settings.key(part, remedy) for part in ("randlora_A", "randlora_B"))
    a, b = (group.header.entries[key][1] for key in shared)
    group.check(len(a) == len(b) == 3 and a[0] == b[2] == r and b[1] >= count)
    group.check(a[1] == 1 or a[1] >= count)
    group.check(a[2] >= small and b[0] >= max(d_out, d_in))
    own = tuple(part for part in ("randlora_A", "randlora_B") if part in group)
    scaling = settings.said("randlora_alpha", 640) / r
    delta = partial(_randlora, f"{group.header.adapter}: {group.module}", (d_out, d_in), scaling)
    parts = ("randlora_lambda", "randlora_gamma", *shared, *own)
    return dense_spec(group, settings, why, parts, delta, (d_out, d_in), needs_base=False)


def _randlora(
    where: str,
    shape: tuple[int, int],
    scaling: float,
    scales: Tensor,
    gains: Tensor,
    a: Tensor,
    b: Tensor,
    *copies: Tensor,
) -> Tensor:
    for copy in copies:  # PEFT saves the shared bases with every module, too
        if not (torch.equal(copy, a) or torch.equal(copy, b)):
            raise AdapterError(f"{where}: its bases are not the file's", "save it again with PEFT")
    count, small = gains.shape
    right = precise(scales)[:, :, None] * precise(a)[:, :count, :small] * precise(gains)
    left = precise(b)[: max(shape), :count].flatten(1)
    delta: Tensor = scaling * left @ right.flatten(0, 1)
    return delta if shape[1] == small else delta.mT
