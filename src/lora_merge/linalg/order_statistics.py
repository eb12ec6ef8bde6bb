"""Exact order statistics of magnitudes that are too many to hold: the k-th largest of a stream."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Calls its argument with (owner, magnitudes >= 0 of any shape) for every part of the stream, in any
# order and perhaps from several threads; the same values every time.
Magnitudes = Callable[[Callable[[int, Tensor], None]], None]
# From an owner and the number of its values to the ranks that are asked for (1 = largest).
Ranks = Callable[[int, int], Sequence[int]]

_DIGIT_BITS = 16
_DIGITS = 1 << _DIGIT_BITS
# Half-width of a bracket in standard errors of the sample quantile: a miss, which costs two more
# sweeps and nothing else, has a chance of about 1e-5.
_BRACKET_SIGMAS = 4.5
# Values caught in a bracket are kept up to this number, and then counted by their bit patterns
# where there are no more than so many (half an octave of float32, 32 MB).
_MOST_CAUGHT = 1 << 18
_MOST_PATTERNS = 1 << 22

Patterns = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Bracket:
    """An interval that probably holds an order statistic."""

    low: float
    high: float


# Holds every one: of few values all are caught, in one sweep.
EVERYTHING = Bracket(0.0, float("inf"))


def sample_brackets(sample: Tensor, fractions: Sequence[float]) -> list[Bracket]:
    """Where the values at some fractions from the top probably lie.

    Args:
        sample: Magnitudes drawn at random, shape (S,).
        fractions: Fractions of all values that are larger than the one sought.

    Returns:
        One bracket per fraction.
    """
    # numpy sorts floats 15 times faster than torch.
    ordered = np.sort(sample.flatten().cpu().numpy())[::-1]
    size = len(ordered)
    brackets = []
    for fraction in fractions:
        slack = _BRACKET_SIGMAS * sqrt(size * fraction * (1 - fraction)) + 2
        first, last = int(size * fraction - slack), int(size * fraction + slack) + 1
        high = float("inf") if first < 0 else float(ordered[min(first, size - 1)])
        low = 0.0 if last >= size else float(ordered[last])
        brackets.append(Bracket(low, high))
    return brackets


def kth_largest(
    values: Magnitudes,
    ranks: Ranks,
    owners: Sequence[int],
    *,
    brackets: Mapping[int, Sequence[Bracket]] | None = None,
) -> dict[int, list[float]]:
    """The values of given rank among each owner's magnitudes, exactly.

    With brackets, one sweep counts what lies above a bracket and catches what lies inside; where
    the value is not inside, and for owners without brackets, a radix search over the bit patterns
    (non-negative floats are ordered as their patterns are) takes two sweeps for float32, four for
    float64, in 512 kB per owner and rank. Both are exact, so the brackets never show in the result.

    Args:
        values: The stream.
        ranks: From an owner and the number of its values to its ranks; rank 0 or below gives
            infinity.
        owners: Whose values to look at.
        brackets: By owner, one per rank.

    Returns:
        By owner, one value per rank; infinity for owners without values.
    """
    found: dict[int, list[float]] = {}
    if brackets:
        found = _bracketed(values, ranks, brackets)
    missing = [owner for owner in owners if owner not in found]
    if missing:
        found |= _radix_search(values, ranks, missing)
    return found


class _Catch:
    """What one sweep learns of one bracket."""

    def __init__(self, bracket: Bracket) -> None:
        self.bracket = bracket
        self.above = 0
        self.dtype = np.dtype(np.float32)
        # Bit patterns of what was caught: they are ordered as the values are.
        self.waiting: list[Patterns] = []
        self.size = 0
        self.counts: Patterns | None = None
        self.lost = False
        self.lock = Lock()

    def take(self, part: Tensor) -> None:
        low, high = self.bracket.low, self.bracket.high
        if part.device.type == "cpu":
            values = part.numpy()  # comparing and picking is five times faster than in torch
            beyond = values > high
            above = int(np.count_nonzero(beyond))
            inside = values[np.not_equal(values >= low, beyond, out=beyond)]
        else:
            above = int(part.gt(high).count_nonzero())
            inside = part[part.ge(low).logical_and_(part.le(high))].cpu().numpy()
        with self.lock:
            self.above += above
            self.dtype = inside.dtype
            self.waiting.append(inside.view(f"i{inside.itemsize}"))
            self.size += inside.size
            if self.size > _MOST_CAUGHT:
                self._count()

    def _count(self) -> None:
        """Replace the values that wait by how often each pattern occurs."""
        caught = np.concatenate(self.waiting)
        self.waiting, self.size = [], 0
        first, last = self._ends()
        self.lost |= last - first >= _MOST_PATTERNS
        if not self.lost:
            counts = np.bincount(caught - first, minlength=last - first + 1)
            self.counts = counts if self.counts is None else self.counts + counts

    def value(self, rank: int) -> float | None:
        """The value of this rank, None if it is not in the bracket."""
        if rank <= 0:
            return float("inf")
        place = rank - self.above  # from the top of the bracket
        if self.counts is not None and self.waiting:
            self._count()
        if place < 1 or self.lost:
            return None
        if self.counts is None:
            if place > self.size:
                return None
            caught = np.concatenate(self.waiting)
            return self._value_of(np.partition(caught, self.size - place)[self.size - place])
        from_top = self.counts[::-1].cumsum()
        if place > from_top[-1]:
            return None
        return self._value_of(self._ends()[1] - int(np.searchsorted(from_top, place)))

    def _ends(self) -> tuple[int, int]:
        """Patterns of the smallest and the largest value that fit."""
        ends = np.array([self.bracket.low, self.bracket.high], self.dtype)
        first, last = ends.view(f"i{self.dtype.itemsize}").tolist()
        return first, last

    def _value_of(self, pattern: int) -> float:
        return float(np.array(pattern, f"i{self.dtype.itemsize}").view(self.dtype))


def _bracketed(
    values: Magnitudes, ranks: Ranks, brackets: Mapping[int, Sequence[Bracket]]
) -> dict[int, list[float]]:
    catches = {owner: [_Catch(b) for b in parts] for owner, parts in brackets.items()}
    counts = dict.fromkeys(brackets, 0)
    lock = Lock()

    def visit(owner: int, part: Tensor) -> None:
        if owner in catches:
            with lock:
                counts[owner] += part.numel()
            for catch in catches[owner]:
                catch.take(part)

    values(visit)
    found = {}
    for owner, parts in catches.items():
        wanted = ranks(owner, counts[owner])
        results = [catch.value(rank) for catch, rank in zip(parts, wanted, strict=True)]
        exact = [value for value in results if value is not None]
        if len(exact) == len(results):
            found[owner] = exact
    return found


def _radix_search(
    values: Magnitudes, ranks: Ranks, owners: Sequence[int]
) -> dict[int, list[float]]:
    """Find each value digit by digit, 16 bits at a time, most significant first."""
    counts = {owner: torch.zeros(_DIGITS, dtype=torch.int64) for owner in owners}
    dtypes: set[torch.dtype] = set()
    lock = Lock()

    def coarse(owner: int, part: Tensor) -> None:
        if owner in counts:
            histogram = _histogram(_bits(part), _last_level(part.dtype))
            with lock:
                dtypes.add(part.dtype)
                counts[owner] += histogram

    values(coarse)
    dtype = dtypes.pop() if dtypes else torch.float32
    searches = {
        owner: [_Search(rank) for rank in ranks(owner, int(count.sum()))]
        for owner, count in counts.items()
    }
    for owner, parts in searches.items():
        for search in parts:
            search.descend(counts[owner])
    for level in range(_last_level(dtype) - 1, -1, -1):
        fine = {o: torch.zeros(len(s), _DIGITS, dtype=torch.int64) for o, s in searches.items()}

        def refine(owner: int, part: Tensor, level: int = level, fine: Any = fine) -> None:
            bits = _bits(part)
            for index, search in enumerate(searches.get(owner, ())):
                histogram = _histogram(_below(bits, search.prefix, level + 1), level)
                with lock:
                    fine[owner][index] += histogram

        values(refine)
        for owner, parts in searches.items():
            for index, search in enumerate(parts):
                search.descend(fine[owner][index])
    return {owner: [s.value(dtype) for s in parts] for owner, parts in searches.items()}


class _Search:
    """A radix search for the value of one rank."""

    def __init__(self, rank: int) -> None:
        self.endless = rank <= 0
        self.remaining = max(rank, 1)
        self.prefix = 0

    def descend(self, count: Tensor) -> None:
        """Choose the digit from a histogram of the values that share the prefix."""
        from_top = count.flip(0).cumsum(0)
        place = int(torch.searchsorted(from_top, self.remaining))
        place = min(place, _DIGITS - 1)
        self.remaining -= int(from_top[place - 1]) if place else 0
        self.prefix = (self.prefix << _DIGIT_BITS) | (_DIGITS - 1 - place)

    def value(self, dtype: torch.dtype) -> float:
        if self.endless:
            return float("inf")
        integer = torch.int32 if dtype == torch.float32 else torch.int64
        return float(torch.tensor([self.prefix], dtype=integer).view(dtype))


def _last_level(dtype: torch.dtype) -> int:
    return dtype.itemsize * 8 // _DIGIT_BITS - 1


def _bits(part: Tensor) -> Tensor:
    integer = torch.int32 if part.dtype == torch.float32 else torch.int64
    return part.contiguous().view(integer).flatten()


def _below(bits: Tensor, prefix: int, level: int) -> Tensor:
    """The bit patterns whose digits from `level` up are `prefix`."""
    shift = _DIGIT_BITS * level
    if bits.device.type != "cpu":
        return bits[bits >> shift == prefix]
    values = bits.numpy()
    return torch.from_numpy(values[values >> shift == prefix])


def _histogram(bits: Tensor, level: int) -> Tensor:
    digits = bits >> (_DIGIT_BITS * level) if level else bits
    if level < _last_level(bits.dtype):
        digits = digits & (_DIGITS - 1)
    return torch.bincount(digits, minlength=_DIGITS).cpu()
