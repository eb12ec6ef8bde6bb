"""Orthonormal coordinates of a stack: where a merge costs R x R instead of d_out x d_in.

With up = Q_u U and down = D Q_d^T, every delta is Q_u (U_i s_i D_i) Q_d^T: a rotation of a small
matrix. Whatever commutes with rotations (sums, inner products, SVDs, least squares) gives the same
result on the small stack (U, D) as on the large one, and is lifted back afterwards. KnOTS uses the
left basis alone, Core Space both (arXiv 2410.19735, 2509.17786).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_merge.adapters.rank_stack import RankStack
from lora_merge.linalg.factors import cholesky, gram, pivot_sign
from lora_merge.merge.recipe.recipe import Anchor

# Basis vectors are x @ mix with a triangular inverse in mix, so their error is the condition
# number times the epsilon of the product. Up to the first number float32 is enough, up to the
# second float64 is, and beyond it the Gram itself is no longer accurate and Householder takes over.
_FLOAT32_MAX_CONDITION = 1e2
_FLOAT64_MAX_CONDITION = 1e5
# Directions of unit-length vectors below this fraction of the largest are rounding, not data.
_RTOL = {torch.float32: 1e-6, torch.float64: 1e-13}
# Rows of a float64 copy at a time while lifting.
_BLOCK = 2048


@dataclass(frozen=True, eq=False)
class Basis:
    """Orthonormal basis of the columns of some x (d, R), as `vectors @ mix`.

    Attributes:
        vectors: Shape (d, n).
        mix: float64, shape (n, p).
        coordinates: Of x's columns, float64, shape (p, R).
        exact: Lift in float64.
        source: The tensor that x is (a view of).
    """

    vectors: Tensor
    mix: Tensor
    coordinates: Tensor
    exact: bool
    source: Tensor

    @classmethod
    def of(cls, x: Tensor, gram: Tensor, source: Tensor | None = None) -> "Basis":
        """The basis of x's columns; `gram` is x^T x in float64; x may be a view of `source`."""
        source = x if source is None else source
        size = gram.diagonal().clamp_min(0).sqrt()
        alive = size > 0
        inverse = torch.where(alive, 1 / size, 0.0)
        if bool(alive.all()) and x.shape[0] >= x.shape[1] > 0:
            lower, condition = cholesky(inverse[:, None] * gram * inverse)
            if condition <= _FLOAT64_MAX_CONDITION:
                identity = torch.eye(x.shape[1], dtype=torch.float64, device=x.device)
                back = torch.linalg.solve_triangular(lower.mT, identity, upper=True)
                exact = condition > _FLOAT32_MAX_CONDITION or x.dtype == torch.float64
                return cls(x, inverse[:, None] * back, lower.mT * size, exact, source)
        return cls._householder(x, size, inverse, source)

    @classmethod
    def _householder(cls, x: Tensor, size: Tensor, inverse: Tensor, source: Tensor) -> "Basis":
        q, r = torch.linalg.qr(x.to(torch.float64) * inverse)
        u, s, vh = torch.linalg.svd(r, full_matrices=False)
        kept = s > _RTOL.get(x.dtype, _RTOL[torch.float32]) * s[:1]
        return cls(q, u[:, kept], (s[kept, None] * vh[kept]) * size, True, source)

    def rotated(self, rotation: Tensor) -> "Basis":
        """The basis with columns `self @ rotation`, rotation orthogonal (p, q)."""
        return replace(self, mix=self.mix @ rotation, coordinates=rotation.mT @ self.coordinates)

    def coordinates_of(self, columns: Tensor, source: Tensor) -> Tensor:
        """Coordinates of the part of some columns (d, n) that is in the basis, float64 (p, n).

        `source` is the tensor that `columns` is (a view of); the basis knows those of its own.
        """
        if source is self.source:
            return self.coordinates
        return self.mix.mT @ gram(self.vectors.mT, columns.mT)

    def lift(self, x: Tensor) -> Tensor:
        """Columns given in coordinates, float64 (p, k), as vectors (d, k) in float32 at least."""
        mixed = self.mix @ x
        if not self.exact:
            return self.vectors @ mixed.to(self.vectors.dtype)
        parts = [block.to(torch.float64) @ mixed for block in self.vectors.split(_BLOCK)]
        return torch.cat(parts)


@dataclass(frozen=True, eq=False)
class Coordinates:
    """A stack and the small stack that is the same up to rotations.

    Attributes:
        core: The units in coordinates, float64: up (p, R), down (R, q).
        left: Basis of the columns of `up`; None if they are not changed.
        right: Basis of the rows of `down`; None if they are not changed.
    """

    core: RankStack
    left: Basis | None
    right: Basis | None

    def lift(self, result: RankStack) -> RankStack:
        """A result in coordinates as a result of the module's size, float32 (float64 stays)."""
        up, down = result.up, result.down
        dtype = torch.float32
        if self.left is not None:
            up = self.left.lift(up.to(torch.float64))
            dtype = torch.promote_types(dtype, self.left.source.dtype)
        if self.right is not None:
            down = self.right.lift(down.to(torch.float64).mT).mT
            dtype = torch.promote_types(dtype, self.right.source.dtype)
        return RankStack(down.to(dtype), up.to(dtype), result.scale, result.owner)


def core_of(stack: RankStack) -> Coordinates:
    """Coordinates on both sides. Any rotation of them will do for methods that commute with it."""
    left = Basis.of(stack.up, stack.gram_up)
    right = Basis.of(stack.down.mT, stack.gram_down, stack.down)
    core = RankStack(right.coordinates.mT, left.coordinates, stack.scale, stack.owner)
    return Coordinates(core, left, right)


def anchored(coordinates: Coordinates, anchor: Anchor) -> Coordinates:
    """Core coordinates in the bases that elementwise rules are defined in.

    Args:
        coordinates: From `core_of`.
        anchor: "stacks": singular vectors of [B_1 … B_N] and [A_1; …; A_N] without their scalings,
            as the authors of Core Space do. "deltas": singular vectors of [Δ_1 … Δ_N] and of
            [Δ_1; …; Δ_N], which do not depend on how the deltas are factored.
    """
    core, left, right = coordinates.core, coordinates.left, coordinates.right
    assert left is not None and right is not None
    if anchor == "stacks":
        to_left, to_right = core.up, core.down.mT
    else:
        to_left, to_right = _side_by_side(core)
    turn_left, turn_right = _principal(to_left), _principal(to_right)
    core = RankStack(core.down @ turn_right, turn_left.mT @ core.up, core.scale, core.owner)
    return Coordinates(core, left.rotated(turn_left), right.rotated(turn_right))


def aligned_of(stack: RankStack, coordinates: Coordinates) -> Coordinates:
    """KnOTS coordinates: the columns in the left singular basis of [Δ_1 … Δ_N], rows as they are.

    Args:
        stack: The stack.
        coordinates: Its core coordinates.
    """
    assert coordinates.left is not None
    to_left, _ = _side_by_side(coordinates.core)
    turn = _principal(to_left)
    up = (turn.mT @ coordinates.core.up).to(stack.down.dtype)
    aligned = RankStack(stack.down, up, stack.scale, stack.owner)
    return Coordinates(aligned, coordinates.left.rotated(turn), None)


def _side_by_side(core: RankStack) -> tuple[Tensor, Tensor]:
    """Small matrices with the column space of [Δ_1 … Δ_N] and of [Δ_1^T … Δ_N^T], same Grams."""
    left, right = [], []
    for owner in core.adapters:
        part = core.of_adapter(owner)
        up = part.up * part.scale
        left.append(up @ torch.linalg.qr(part.down.mT, mode="r").R.mT)
        right.append((part.down.mT * part.scale) @ torch.linalg.qr(part.up, mode="r").R.mT)
    return torch.cat(left, dim=1), torch.cat(right, dim=1)


def _principal(x: Tensor) -> Tensor:
    """Left singular vectors of x that belong to nonzero singular values, signs fixed."""
    u, s, _ = torch.linalg.svd(x, full_matrices=False)
    principal: Tensor = u[:, s > _RTOL[torch.float32] * s[:1]]
    return principal * pivot_sign(principal)
