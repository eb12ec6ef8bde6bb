"""Tuners that are sparse or circulant in another basis: of full rank, read on request alone."""

from functools import partial
from math import sqrt

import torch
from torch import Tensor

from lora_merge.adapters.dialects.full_rank.asked import refuse_unasked
from lora_merge.adapters.dialects.grouping import Group
from lora_merge.adapters.dialects.recipes.units import precise
from lora_merge.adapters.dialects.tuners.full_rank import dense_spec
from lora_merge.adapters.dialects.tuners.settings import Settings
from lora_merge.adapters.forms import ModuleSpec
from lora_merge.errors import LoraMergeError

# Those whose filters PEFT has as they are.
_WAVELETS = {f"db{n}" for n in range(1, 11)} | {f"sym{n}" for n in range(2, 11)}
_WAVELETS |= {"coif1", "coif2", "coif3"}


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
    refuse_unasked(group, why)
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


def waveft(group: Group, settings: Settings) -> ModuleSpec:
    """WaveFT: a few wavelet coefficients of the delta, at places drawn from a seed (2505.12532)."""
    why = "WaveFT is sparse in a basis of wavelets"
    refuse_unasked(group, why)
    (count,) = group.shape("waveft_spectrum", 1)
    shape = settings.base_shape(group)
    group.check(count <= shape[0] * shape[1])
    family = settings.said("wavelet_family", "db1") if settings.said("use_idwt", True) else None
    filters = None if family is None else _filters(group, family)
    seed, scaling = int(settings.said("random_loc_seed", 777)), settings.said("scaling", 25.0)
    delta = partial(_waveft, shape, seed, float(scaling), filters)
    parts = ("waveft_spectrum",)
    return dense_spec(group, settings, why, parts, delta, shape, needs_base=False)


def _filters(group: Group, family: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Low-pass and high-pass filter of the inverse transform; all but Haar's from PyWavelets.

    PEFT 0.21.2 has tables of its own. Those of coif4 and coif5 are not the wavelets' (no inverse of
    anything), and it has none for the longer ones that its config takes.
    """
    if family == "db1":
        return (sqrt(0.5), sqrt(0.5)), (sqrt(0.5), -sqrt(0.5))
    if family not in _WAVELETS:
        group.refuse(f"PEFT's filters of {family!r} are not known here", "merge it with PEFT")
    try:
        import pywt
    except ImportError as error:
        raise LoraMergeError(
            f"WaveFT's wavelet {family} needs PyWavelets, which is not installed",
            "pip install 'lora-merge[wavelets]'",
        ) from error
    wavelet = pywt.Wavelet(family)
    return tuple(wavelet.rec_lo), tuple(wavelet.rec_hi)


def _waveft(
    shape: tuple[int, int],
    seed: int,
    scaling: float,
    filters: tuple[tuple[float, ...], tuple[float, ...]] | None,
    spectrum: Tensor,
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    place = torch.randperm(shape[0] * shape[1], generator=generator)[: len(spectrum)]
    row, column = place // shape[1], place % shape[1]
    if filters is None:
        sparse = torch.zeros(shape)
        sparse[row, column] = spectrum.float()
        return sparse * scaling
    # A filter of length L shortens each axis by L - 2, and halves need an even number of rows.
    sizes = [size + len(filters[0]) - 2 for size in shape]
    sizes = [size + size % 2 for size in sizes]
    margins = [(size - wanted) // 2 for size, wanted in zip(sizes, shape, strict=True)]
    padded = torch.zeros(sizes)
    padded[row + margins[0], column + margins[1]] = spectrum.float()
    # PEFT takes the upper right quarter for details of rows, where it stands for those of columns.
    above, below = padded.chunk(2)
    right = above[:, sizes[1] // 2 :].clone()
    above[:, sizes[1] // 2 :] = below[:, : sizes[1] // 2]
    below[:, : sizes[1] // 2] = right
    whole = _inverse(_inverse(padded, *filters).mT, *filters).mT * scaling
    starts = [(size - wanted) // 2 for size, wanted in zip(whole.shape, shape, strict=True)]
    return whole[starts[0] : starts[0] + shape[0], starts[1] : starts[1] + shape[1]].contiguous()


def _inverse(x: Tensor, low: tuple[float, ...], high: tuple[float, ...]) -> Tensor:
    """One level of the inverse transform along the rows: averages above, details below."""
    averages, details = x.chunk(2)
    n, length = len(averages), len(low)
    full = x.new_zeros(2 * n + length - 2, x.shape[1])
    for k in range(length):
        full[k : k + 2 * n : 2] += low[k] * averages + high[k] * details
    return full[length - 2 : 2 * n]
