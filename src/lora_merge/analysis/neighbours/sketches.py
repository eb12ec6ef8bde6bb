"""A few thousand numbers of an adapter that stand for its deltas where inner products are wanted.

With random signs S (m, p) and T (n, p), the p x p numbers S^T D T / p of two deltas D have the
inner product of the deltas as their mean (Johnson and Lindenstrauss, made of two factors; a D of
low rank costs (m + n) r p). Modules are added up in buckets, each with signs of its own, so that an
adapter has as many numbers however large the model is.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_merge.adapters.rank_stack import RankStack
from lora_merge.linalg.random_bits import mask_key, random_bits
from lora_merge.linalg.unit_sums import product_dtype, times, transposed_times

COLUMNS = 32
BUCKETS = 16
NUMBERS = BUCKETS * COLUMNS**2
# Numbers of a part of the table of all cosines, of which only each row's largest are kept.
_PART = 1 << 24


def sketch(stack: RankStack, module: str, count: int) -> Tensor:
    """The numbers of every adapter of one module, float32, shape (count, COLUMNS^2).

    Args:
        stack: The module's units; owners index the adapters.
        module: Its name, of which the random signs are a function.
        count: Adapters; those that own no unit get zeros.
    """
    dtype = product_dtype(stack.up, stack.down)
    left = transposed_times(stack.up, _signs(module, "out", stack.d_out), dtype)
    right = times(stack.down, _signs(module, "in", stack.d_in), dtype)
    right *= stack.scale[:, None].float() / COLUMNS
    found = torch.zeros(count, COLUMNS**2)
    ends = torch.bincount(stack.owner).cumsum(0).tolist()
    for owner, end in enumerate(ends):
        own = slice(ends[owner - 1] if owner else 0, end)
        found[owner] = (left[own].mT @ right[own]).flatten()
    return found


def bucket_of(index: int) -> slice:
    """Where the numbers of a module are added, of an adapter's `NUMBERS`."""
    start = index % BUCKETS * COLUMNS**2
    return slice(start, start + COLUMNS**2)


@dataclass(frozen=True, eq=False)
class Candidates:
    """Each adapter's nearest by sketched cosines.

    Attributes:
        indices: int64, shape (N, k), nearest first.
        cosines: Sketched, float32, shape (N, k).
    """

    indices: Tensor
    cosines: Tensor


def nearest(sketches: Tensor, norms: Tensor, count: int) -> Candidates:
    """The `count` adapters whose sketched cosine with each is largest in magnitude.

    Args:
        sketches: Shape (N, NUMBERS).
        norms: Of the deltas, float64, shape (N,); what has none is near nobody.
        count: At most N - 1.
    """
    unit = sketches * torch.where(norms > 0, 1 / norms, 0.0)[:, None].float()
    parts = [_largest(unit, rows, count) for rows in _rows(len(unit))]
    return Candidates(*(torch.cat(one) for one in zip(*parts, strict=True)))


def part_bytes(adapters: int) -> int:
    """Memory of the part of the table of cosines that is worked on."""
    return 3 * 4 * max(min(_PART, adapters**2), adapters)


def _largest(unit: Tensor, rows: slice, count: int) -> tuple[Tensor, Tensor]:
    cosines = unit[rows] @ unit.mT
    own = torch.arange(rows.start, rows.stop)
    magnitudes = cosines.abs()
    magnitudes[own - rows.start, own] = -1  # nobody is its own neighbour
    # A stable order: ties go to the adapter that comes first.
    order = magnitudes.sort(dim=1, descending=True, stable=True).indices[:, :count]
    return order, cosines.gather(1, order)


def _rows(count: int) -> Iterator[slice]:
    step = max(_PART // count, 1)
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def _signs(module: str, side: str, rows: int) -> Tensor:
    bits = random_bits(mask_key(0, module, side), 0, (rows, COLUMNS))
    return torch.where(bits < 0, -1.0, 1.0)
