"""One stack through a whole merge: weights, steps before, combiner, steps after, compression.

Everything here is a pure function of one module's stack; the executor supplies the stacks and the
report what came of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from lora_merge.adapters.rank_stack import RankStack
from lora_merge.linalg.gram_krylov import leading_triplets
from lora_merge.linalg.range_finder import cut_svd, is_worth_it
from lora_merge.linalg.unit_sums import leading_units
from lora_merge.merge import calibrate
from lora_merge.merge.methods.method import Job, Method, Outcome
from lora_merge.merge.methods.spaces import (
    Basis,
    Coordinates,
    aligned_of,
    anchored,
    core_of,
)
from lora_merge.merge.methods.spectral import smoothed, svc, triplets
from lora_merge.merge.recipe.recipe import Semantics


@dataclass(frozen=True, eq=False)
class Merged:
    """One module's merged delta before compression.

    Attributes:
        stack: The result; in the coordinates of `place` where there is one.
        place: What lifts it to the module's size, None where it has that already.
        exact: The weighted sum that errors are measured against, at the module's size.
        outcome: What the combiner said besides.
        squares: Squared norm of each weighted adapter, by owner, 0 for absent ones.
    """

    stack: RankStack
    place: Coordinates | None
    exact: RankStack
    outcome: Outcome
    squares: tuple[float, ...]

    def whole(self) -> "Finished":
        """The result at the module's size, nothing cut."""
        stack = self.stack if self.place is None else self.place.lift(self.stack)
        exact = self.exact_square
        square, cross = self._products(stack)
        before = square / (self.outcome.energy or 1.0)
        return self._finished(stack, exact, square, cross, before)

    @cached_property
    def exact_square(self) -> tuple[float, float]:
        """Squared norm of the exact sum, and its standard error."""
        return self.exact.squared_norm()

    def _finished(
        self, stack: RankStack, exact: tuple[float, float], square: float, cross: float, full: float
    ) -> "Finished":
        norm, error = norm_of(*exact)
        return Finished(stack, norm, square, cross, full, self.squares, self.outcome.details, error)

    def _products(self, stack: RankStack) -> tuple[float, float]:
        """<result, result> and <exact, result>, from the exact stack's Grams where possible."""
        exact, mixes = self.exact, self.outcome.mixes
        if stack.up is exact.up and stack.down is exact.down:
            if self._same(stack):
                return self.exact_square[0], self.exact_square[0]
            products = exact.gram_up * exact.gram_down
            square = stack.scale @ products @ stack.scale
            return float(square), float(exact.scale @ products @ stack.scale)
        if mixes is None or self.stack is not self.outcome.stack:
            return stack.inner(stack), exact.inner(stack)
        down_mix, up_mix = mixes
        down, up = down_mix @ exact.gram_down, up_mix @ exact.gram_up
        square = stack.scale @ ((down @ down_mix.mT) * (up @ up_mix.mT)) @ stack.scale
        return float(square), float(stack.scale @ (down * up) @ exact.scale)

    def leading(self, rank: int) -> "Finished":
        """The cut of a result in units to a rank far below their number, nothing decomposed."""
        stack = self.stack
        if stack.estimated:
            found = leading_units(stack.up, stack.scale, stack.down, rank)
            u, s, vh, whole = found.u, found.s, found.vh, (found.square, found.error)
        else:
            u, s, vh = leading_triplets(
                stack.up, stack.scale, stack.down, stack.gram_up, stack.gram_down, rank
            )
            whole = stack.squared_norm()
        root = s.sqrt()
        kept = RankStack.single(u * root.to(u.dtype), root[:, None].to(vh.dtype) * vh)
        square = float(s.square().sum())
        # A projection's product with what was projected is its square.
        exact, cross = (
            (whole, square) if self._same(stack) else (self.exact_square, self.exact.inner(kept))
        )
        full = max(whole[0], square) / (self.outcome.energy or 1.0)
        return self._finished(kept, (max(exact[0], square), exact[1]), square, cross, full)

    def _same(self, stack: RankStack) -> bool:
        """Whether a stack is the exact sum itself."""
        exact = self.exact
        same = stack.up is exact.up and stack.down is exact.down
        return same and torch.allclose(stack.scale, exact.scale, rtol=1e-12, atol=0)

    def decomposed(self, rank: int | None = None) -> "Decomposed":
        """The result's singular units; the leading ones alone where a rank allows it."""
        stack, left, right = self._small()
        found = cut_svd(stack.delta(), rank)
        s = found.s
        on_left = left.coordinates_of(self.exact.up, self.exact.up)
        on_right = right.coordinates_of(self.exact.down.mT, self.exact.down)
        met = (found.u.mT @ on_left) * self.exact.scale * (found.vh @ on_right)
        root = s.sqrt()
        units = RankStack.single(found.u * root, root[:, None] * found.vh)
        return Decomposed(
            units,
            Coordinates(units, left, right),
            s,
            s * met.sum(dim=1),
            found.square,
            self.exact_square,
            self.squares,
            self.outcome,
        )

    def _small(self) -> tuple[RankStack, Basis, Basis]:
        """The result in coordinates of both sides, float64."""
        stack, place = self.stack, self.place
        if place is not None and place.left is not None and place.right is not None:
            return stack, place.left, place.right
        if place is None:
            place = core_of(stack)
            assert place.left is not None and place.right is not None
            return place.core, place.left, place.right
        assert place.left is not None
        # Columns are in coordinates already; what has to be found is those of the rows.
        inside = core_of(replace(stack, up=stack.up.to(torch.float64)))
        assert inside.left is not None and inside.right is not None
        size = inside.left.mix.shape[1]
        turn = inside.left.lift(torch.eye(size, dtype=torch.float64, device=stack.up.device))
        return inside.core, place.left.rotated(turn), inside.right


@dataclass(frozen=True, eq=False)
class Decomposed:
    """A result as singular units in coordinates: any rank can be cut and lifted from it.

    Attributes:
        units: sqrt(value) in both halves, values descending.
        place: What lifts them.
        values: Singular values, float64, shape (k,).
        cross: Inner product of each unit with the exact sum, float64, shape (k,).
        square: Squared norm of all of the result.
        exact_square: Squared norm of the exact sum, and its standard error.
        squares: Squared norm of each weighted adapter.
        outcome: What the combiner said besides.
    """

    units: RankStack
    place: Coordinates
    values: Tensor
    cross: Tensor
    square: float
    exact_square: tuple[float, float]
    squares: tuple[float, ...]
    outcome: Outcome

    def cut(self, rank: int) -> "Finished":
        """The best approximation of a rank, at the module's size."""
        keep = min(rank, self.units.num_units)
        kept = self.units.units(torch.arange(keep, device=self.values.device))
        energy = self.values.square()
        norm, error = norm_of(*self.exact_square)
        return Finished(
            self.place.lift(kept),
            norm,
            float(energy[:keep].sum()),
            float(self.cross[:keep].sum()),
            self.square / (self.outcome.energy or 1.0),
            self.squares,
            self.outcome.details,
            error,
        )


@dataclass(frozen=True, eq=False)
class Finished:
    """One module's result as it will be written, and what is known of it.

    Attributes:
        stack: The units, at the module's size.
        exact_norm: Frobenius norm of the exact weighted sum.
        square: Squared norm of the result.
        cross: Inner product of the result with the exact sum.
        full_square: Squared norm before the cut to a rank.
        adapter_squares: Squared norm of each weighted adapter.
        details: What the method says of this module.
        exact_error: Standard error of `exact_norm`; 0 where it is exact.
    """

    stack: RankStack
    exact_norm: float
    square: float
    cross: float
    full_square: float
    adapter_squares: tuple[float, ...]
    details: Mapping[str, Any]
    exact_error: float = 0.0


def norm_of(square: float, error: float) -> tuple[float, float]:
    """A norm and its standard error, from those of its square."""
    norm = sqrt(max(square, 0.0))
    return norm, error / (2 * norm) if norm > 0 else 0.0


def merge_stack(
    stack: RankStack, job: Job, method: Method, options: Any, semantics: Semantics
) -> Merged:
    """Merge one stack; nothing is cut unless the method itself makes the rank asked for.

    Args:
        stack: The adapters that are present in this module.
        job: Module, rank, raw weights (absent adapters have weight 0).
        method: The method.
        options: Its options object.
        semantics: What all methods share.
    """
    how = semantics.normalize or method.normalize
    weights = calibrate.present_weights(job.weights, stack.adapters, how, job.module)
    exact = stack.weighted(weights * semantics.factor)
    source = _prepared(stack, semantics)
    wanted = calibrate.wanted_norm(source, weights, semantics.restore_norm)
    source, view, place = _view(source, method, semantics)
    space = semantics.space or method.space
    job = replace(job, weights=weights, space=space, source=stack, exact=semantics.exact)
    outcome = method.combine(view, job, options)
    own = exact.adapter_squares()
    squares = tuple(own) + (0.0,) * (len(weights) - len(own))
    merged = Merged(outcome.stack, place, exact, outcome, squares)
    if semantics.svc:
        merged = _calibrated(merged, source, weights)
    return _scaled(merged, semantics.factor, wanted)


def finish(merged: Merged, rank: int | None, *, exact: bool = False) -> Finished:
    """The result at the module's size, cut to a rank if it has more units.

    Args:
        merged: The result.
        rank: Rank; None keeps all units.
        exact: Cut by the whole decomposition, whatever the rank.
    """
    if rank is None or merged.stack.num_units <= rank:
        return merged.whole()
    if merged.place is None and not exact and is_worth_it(merged.stack.num_units, rank):
        return merged.leading(rank)
    return merged.decomposed(None if exact else rank).cut(rank)


def prepare_view(
    stack: RankStack, job: Job, method: Method, semantics: Semantics
) -> tuple[RankStack, Job]:
    """The stack and the job as the combiner will see them, for `Method.prepare`."""
    how = semantics.normalize or method.normalize
    weights = calibrate.present_weights(job.weights, stack.adapters, how, job.module)
    source = _prepared(stack, semantics)
    _, view, _ = _view(source, method, semantics)
    space = semantics.space or method.space
    return view, replace(job, weights=weights, space=space, source=stack)


def _prepared(stack: RankStack, semantics: Semantics) -> RankStack:
    """The adapters after the steps that each goes through by itself."""
    if semantics.smooth != "none":
        place = core_of(stack)
        stack = place.lift(smoothed(triplets(place.core), semantics.smooth))
    return calibrate.equalised(stack) if semantics.norm_equalise else stack


def _view(
    source: RankStack, method: Method, semantics: Semantics
) -> tuple[RankStack, RankStack, Coordinates | None]:
    """The adapters after Pico, the same as the combiner sees them, and its coordinates."""
    space = semantics.space or method.space
    if space not in ("aligned", "core"):
        if semantics.pico:
            place = core_of(source)
            source = place.lift(calibrate.pico(place.core))
        return source, source, None
    place = core_of(source)
    if semantics.pico:
        place = replace(place, core=calibrate.pico(place.core))
    if space == "aligned":
        aligned = aligned_of(source, place)
        return (place.lift(place.core) if semantics.pico else source), aligned.core, aligned
    if method.anchored:
        place = anchored(place, semantics.basis)
    return source, place.core, place


def _calibrated(merged: Merged, source: RankStack, weights: Tensor) -> Merged:
    """The result after SVC, in coordinates that hold it and all adapters."""
    place = merged.place
    if place is None or place.right is None:
        wide = merged.stack if place is None else place.lift(merged.stack)
        dtype = torch.promote_types(wide.up.dtype, source.up.dtype)
        both = RankStack(
            torch.cat([source.down.to(dtype), wide.down.to(dtype)]),
            torch.cat([source.up.to(dtype), wide.up.to(dtype)], dim=1),
            torch.cat([source.scale, wide.scale]),
            torch.cat([source.owner, torch.full_like(wide.owner, -1)]),
        )
        place = core_of(both)
        ours = both.owner < 0
        result, adapters = place.core.units(ours), place.core.units(~ours)
        place = replace(place, core=adapters)
        merged = replace(merged, stack=result, place=place)
    else:
        adapters = place.core
    return replace(merged, stack=svc(merged.stack, adapters, weights))


def _scaled(merged: Merged, scale: float, wanted: float | None) -> Merged:
    """The result times the global scale, after its norm was restored."""
    factor = scale
    if wanted is not None:
        norm = merged.stack.norm()
        factor *= wanted / norm if norm > 0 else 1.0
    if factor == 1.0:
        return merged
    return replace(merged, stack=merged.stack.scaled(factor))
