"""Tuners whose delta has full rank: read on request alone, to be cut with the error told.

Each gives all its units (`split` of the dense delta), so that whoever cuts them knows what is lost.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lora_merge.adapters.dialects.grouping import Group
from lora_merge.adapters.dialects.recipes.selection import entries_of
from lora_merge.adapters.dialects.recipes.units import Units, precise, split
from lora_merge.adapters.dialects.tuners.settings import Settings
from lora_merge.adapters.dialects.tuners.with_base import cayley, skew
from lora_merge.adapters.forms import ModuleSpec
from lora_merge.adapters.units import BaseWeight


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
    """A module whose delta is made whole.

    Args:
        group: The module.
        settings: Of its file.
        why: Why it has full rank, for the refusal.
        parts: What `delta` takes.
        delta: Gives it, shape (d_out, d_in); with `needs_base` it takes `base`.
        shape: (d_out, d_in).
        needs_base: Whether W takes part.
    """
    refuse_unasked(group, settings, why)
    if settings.config.fan_in_fan_out:
        group.refuse(f"{why}, of a Conv1D", "leave this adapter out")
    return group.spec(
        parts,
        partial(_whole, delta),
        d_out=shape[0],
        d_in=shape[1],
        rank=min(shape),
        verdict="approximate",
        needs_base=needs_base,
    )


def refuse_unasked(group: Group, settings: Settings, why: str) -> None:
    """Refuse a delta of full rank that nobody asked to cut.

    Raises:
        AdapterError: Naming the command that cuts it and tells the error.
    """
    if settings.header.rank is None:
        group.refuse(
            f"{why}, so its change has full rank",
            "cut it and see the error: lora-merge convert --base DIR --energy 0.95 (or --rank)",
        )


def _whole(delta: Callable[..., Tensor], *tensors: Tensor, **base: object) -> Units:
    return split(delta(*tensors, **base))


def ia3(group: Group, settings: Settings) -> ModuleSpec:
    """IA3: rows or columns of W times a vector."""
    why = "IA3 scales the base weight"
    refuse_unasked(group, settings, why)
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


def c3a(group: Group, settings: Settings) -> ModuleSpec:
    """C3A: a grid of circulant blocks."""
    m, n, size = group.shape("c3a_kernel", 3)
    why = "C3A is made of circulant blocks"
    shape = (m * size, n * size)
    return dense_spec(group, settings, why, ("c3a_kernel",), _c3a, shape, needs_base=False)


def _c3a(kernel: Tensor) -> Tensor:
    """Entry (k, j) of a block is its kernel's entry j - k, all over the width of the input."""
    m, n, size = kernel.shape
    place = (torch.arange(size)[None, :] - torch.arange(size)[:, None]) % size
    blocks = precise(kernel)[:, :, place]  # m, n, k, j
    return blocks.permute(0, 2, 1, 3).reshape(m * size, n * size) / (n * size)


def fourierft(group: Group, settings: Settings) -> ModuleSpec:
    """FourierFT: a few entries of the delta's Fourier transform, at places drawn from a seed."""
    why = "FourierFT is sparse in another basis"
    refuse_unasked(group, settings, why)
    (count,) = group.shape("fourierft_spectrum", 1)
    shape = settings.base_shape(group)
    seed = settings.said("random_loc_seed", 777)
    group.check(count <= shape[0] * shape[1])
    delta = partial(_fourierft, shape, int(seed), float(settings.said("scaling", 150.0)))
    parts = ("fourierft_spectrum",)
    return dense_spec(group, settings, why, parts, delta, shape, needs_base=False)


def _fourierft(shape: tuple[int, int], seed: int, scaling: float, spectrum: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    place = torch.randperm(shape[0] * shape[1], generator=generator)[: len(spectrum)]
    dense = torch.zeros(shape[0] * shape[1])
    dense[place] = spectrum.float()
    delta: Tensor = torch.fft.ifft2(dense.view(shape)).real * scaling
    return delta


def oft(group: Group, settings: Settings) -> ModuleSpec:
    """OFT: W times a block-diagonal rotation of the input."""
    why = "OFT rotates the base weight"
    refuse_unasked(group, settings, why)
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


def shira(group: Group, settings: Settings) -> ModuleSpec:
    """SHiRA: a few entries; exact while they touch few rows or columns."""
    (count,) = group.shape("shira_weight", 1)
    group.check(group.shape("shira_indices") == (2, count))
    d_out, d_in = settings.base_shape(group)
    rank = min(count, d_out, d_in)
    if 4 * rank > min(d_out, d_in):
        refuse_unasked(group, settings, f"SHiRA changes {count} entries all over the weight")
    units = partial(_shira, (d_out, d_in), rank)
    parts = ("shira_weight", "shira_indices")
    return group.spec(parts, units, d_out=d_out, d_in=d_in, rank=rank)


def _shira(shape: tuple[int, int], rank: int, values: Tensor, index: Tensor) -> Units:
    units = entries_of(values, index[0].long(), index[1].long(), shape)
    missing = rank - units.rank  # zeros: the header does not tell how many rows are touched
    a = torch.cat([units.a, units.a.new_zeros(missing, shape[1])])
    return Units(a, torch.cat([units.b, units.b.new_zeros(shape[0], missing)], dim=1))


def dora(group: Group, settings: Settings) -> ModuleSpec:
    """DoRA: every row of W + s B A brought to a trained norm."""
    why = "DoRA rescales the base weight"
    refuse_unasked(group, settings, why)
    (r, d_in), (d_out, columns) = group.shape("lora_A.weight", 2), group.shape("lora_B.weight", 2)
    part = "lora_magnitude_vector"
    part = part if part in group else part + ".weight"
    group.check(r == columns and group.shape(part) == (d_out,))
    delta = partial(_dora, settings.config.scaling_of(group.module, r))
    parts = ("lora_A.weight", "lora_B.weight", part)
    return dense_spec(group, settings, why, parts, delta, (d_out, d_in), needs_base=True)


def _dora(scaling: float, a: Tensor, b: Tensor, norms: Tensor, *, base: BaseWeight) -> Tensor:
    w = base.dense()
    moved = w + scaling * precise(b) @ precise(a)
    turned: Tensor = moved * (precise(norms) / moved.norm(dim=1))[:, None]
    return turned - w
