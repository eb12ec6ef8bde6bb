"""The rank stack: every adapter of one module, taken apart into rank-one units."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import sqrt

import torch
from torch import Tensor

from lora_merge.linalg.factors import gram, thin_svd
from lora_merge.linalg.unit_sums import LARGEST_GRAM, estimated_square


@dataclass(frozen=True, eq=False)
class RankStack:
    """All rank-wise units that touch one weight matrix, N adapters, R = r_1 + ... + r_N units.

    Unit j adds `scale[j] * outer(up[:, j], down[j])` to the weight. (LoRA-LEGO calls the pair
    (down[j], up[:, j]) a minimal semantic unit, arXiv 2409.16167.)

    Attributes:
        down: Rows of every A_i, shape (R, d_in).
        up: Columns of every B_i, shape (d_out, R).
        scale: Scaling of the adapter that unit j came from, float64, shape (R,).
        owner: Index of that adapter, int64, shape (R,), non-decreasing.
    """

    down: Tensor
    up: Tensor
    scale: Tensor
    owner: Tensor

    def __post_init__(self) -> None:
        """Reject shapes that do not belong together; a wrong stack is a bug, not bad input."""
        size = self.down.shape[0]
        if self.up.shape[1] != size or self.scale.shape != (size,) or self.owner.shape != (size,):
            raise ValueError(
                f"down {tuple(self.down.shape)}, up {tuple(self.up.shape)}, "
                f"scale {tuple(self.scale.shape)}, owner {tuple(self.owner.shape)}"
            )

    @classmethod
    def of(cls, factors: Sequence[tuple[Tensor, Tensor, float]]) -> "RankStack":
        """Stack adapters given as (A, B, scaling), A of shape (r, d_in), B of shape (d_out, r)."""
        ranks = [a.shape[0] for a, _, _ in factors]
        device = factors[0][0].device
        scale = torch.tensor([s for _, _, s in factors], dtype=torch.float64, device=device)
        repeats = torch.tensor(ranks, device=device)
        return cls(
            down=torch.cat([a for a, _, _ in factors]),
            up=torch.cat([b for _, b, _ in factors], dim=1),
            scale=scale.repeat_interleave(repeats),
            owner=torch.arange(len(ranks), device=device).repeat_interleave(repeats),
        )

    @classmethod
    def single(cls, up: Tensor, down: Tensor, scale: Tensor | None = None) -> "RankStack":
        """One adapter, owner 0: up (m, k), down (k, n), scale (k,) or ones."""
        size, device = down.shape[0], down.device
        if scale is None:
            scale = torch.ones(size, device=device)
        owner = torch.zeros(size, dtype=torch.int64, device=device)
        return cls(down, up, scale.to(torch.float64), owner)

    @classmethod
    def joined(cls, parts: Sequence["RankStack"]) -> "RankStack":
        """The units of several stacks of one module, one after the other."""
        return cls(
            torch.cat([part.down for part in parts]),  # of the widest dtype
            torch.cat([part.up for part in parts], dim=1),
            torch.cat([part.scale for part in parts]),
            torch.cat([part.owner for part in parts]),
        )

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """Thin SVD of the delta, from the factors: u (d_out, k), s (k,), vh (k, d_in)."""
        return thin_svd(self.up * self.scale.to(self.up.dtype), self.down)

    @property
    def num_units(self) -> int:
        """R."""
        return self.down.shape[0]

    @property
    def d_in(self) -> int:
        """Width of the module's input."""
        return self.down.shape[1]

    @property
    def d_out(self) -> int:
        """Width of the module's output."""
        return self.up.shape[0]

    @cached_property
    def adapters(self) -> tuple[int, ...]:
        """The owners that are present, ascending."""
        return tuple(sorted(set(self.owner.tolist())))

    @cached_property
    def gram_down(self) -> Tensor:
        """Inner products of the rows of `down`, float64, shape (R, R)."""
        return gram(self.down)

    @cached_property
    def gram_up(self) -> Tensor:
        """Inner products of the columns of `up`, float64, shape (R, R)."""
        return gram(self.up.mT)

    def measured(self, precise: torch.dtype = torch.float64) -> "RankStack":
        """The stack with both Grams computed.

        Args:
            precise: Of the products within a chunk of columns: float32 is twice as fast, and right
                to 1e-6 of the units' lengths.
        """
        stack = replace(self)
        stack.__dict__["gram_down"] = gram(self.down, precise=precise)
        stack.__dict__["gram_up"] = gram(self.up.mT, precise=precise)
        return stack

    def units(self, index: Tensor) -> "RankStack":
        """The sub-stack of some units. `index` is a bool mask or int64 indices, shape (n,)."""
        return RankStack(self.down[index], self.up[:, index], self.scale[index], self.owner[index])

    def of_adapter(self, owner: int) -> "RankStack":
        """The slice that is one adapter."""
        return self.units(self.owner == owner)

    def weighted(self, weights: Tensor) -> "RankStack":
        """Multiply each adapter by its weight, float64, shape (N,), indexed by owner."""
        return self.scaled(weights[self.owner])

    def scaled(self, factor: Tensor | float) -> "RankStack":
        """Multiply each unit by a factor, float64, shape (R,), or all by one.

        The Grams do not depend on scales: those already computed are shared.
        """
        stack = replace(self, scale=self.scale * factor)
        shared = {"gram_down", "gram_up"}
        stack.__dict__.update({name: self.__dict__[name] for name in shared & self.__dict__.keys()})
        return stack

    def transposed(self) -> "RankStack":
        """The stack of the transposed deltas."""
        return RankStack(self.up.mT, self.down.mT, self.scale, self.owner)

    def adapter_products(self) -> Tensor:
        """All inner products <Delta_i, Delta_j> of the adapters, float64, shape (N, N).

        <Delta_i, Delta_j> = s_i s_j sum((B_i^T B_j) * (A_i A_j^T)): the deltas are not formed.
        """
        products = self.gram_up * self.gram_down
        products.mul_(self.scale[:, None]).mul_(self.scale)
        count = int(self.owner.max()) + 1 if self.num_units else 0
        rows = torch.zeros(count, self.num_units, dtype=torch.float64, device=products.device)
        rows.index_add_(0, self.owner, products)
        total = torch.zeros(count, count, dtype=torch.float64, device=products.device)
        return total.index_add_(1, self.owner, rows)

    def adapter_squares(self) -> list[float]:
        """Squared Frobenius norm of each adapter's delta, by owner; 0 of absent ones.

        Of each adapter's own Grams alone, whether or not those of all units are known.
        """
        ends = torch.bincount(self.owner).cumsum(0).tolist()
        squares = [0.0] * len(ends)
        known = "gram_up" in self.__dict__ and "gram_down" in self.__dict__
        for owner, end in enumerate(ends):
            own = slice(ends[owner - 1] if owner else 0, end)
            if known:
                products = self.gram_up[own, own] * self.gram_down[own, own]
            else:
                products = gram(self.up[:, own].mT) * gram(self.down[own])
            scale = self.scale[own]
            squares[owner] = float(scale @ products @ scale)
        return squares

    def inner(self, other: "RankStack") -> float:
        """Frobenius inner product of the two stacks' deltas."""
        if other is self:
            products = self.gram_up * self.gram_down
        else:
            products = gram(self.up.mT, other.up.mT) * gram(self.down, other.down)
        return float((self.scale @ products @ other.scale).item())

    def norm(self) -> float:
        """Frobenius norm of the delta."""
        return sqrt(max(self.inner(self), 0.0))

    @property
    def estimated(self) -> bool:
        """Whether there are too many units for their inner products, and nobody has these."""
        return self.num_units > LARGEST_GRAM and "gram_up" not in self.__dict__

    def squared_norm(self) -> tuple[float, float]:
        """Squared Frobenius norm and its standard error: an estimate of many units.

        0 is the error of a norm that is exact: of few units, or where the Grams are known.
        """
        if not self.estimated:
            return max(self.inner(self), 0.0), 0.0
        return estimated_square(self.up, self.scale, self.down)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start..stop of the delta, shape (stop - start, d_in), in the stack's dtype."""
        return (self.up[start:stop] * self.scale.to(self.up.dtype)) @ self.down

    def delta(self) -> Tensor:
        """The whole delta, shape (d_out, d_in). For tests and small modules."""
        return self.rows(0, self.d_out)

    def balanced(self) -> tuple[Tensor, Tensor]:
        """Factors (A, B) of the same delta with scaling 1 and |a_j| close to |b_j|.

        Balanced halves are the safest for float16 files. The factor put on A is a power of two, so
        A keeps every bit, B is rounded only by what the scaling demands, and the norms of a pair
        differ by at most a factor of two. Zero units stay zero.

        Returns:
            A of shape (R, d_in) and B of shape (d_out, R).
        """
        norm_down, norm_up = _norms(self.down, 1), _norms(self.up, 0)
        alive = (self.scale != 0) & (norm_down > 0) & (norm_up > 0)
        ratio = torch.where(alive, self.scale.abs() * norm_up / norm_down, 1.0)
        to_down = torch.where(alive, torch.exp2((ratio.log2() / 2).round()), 0.0)
        to_up = torch.where(alive, self.scale / to_down, 0.0)
        return (
            self.down * to_down[:, None].to(self.down.dtype),
            self.up * to_up[None, :].to(self.up.dtype),
        )

    def unbalanced(self) -> tuple[Tensor, Tensor]:
        """Factors (A, B) of the same delta with scaling 1, A as it is."""
        return self.down, self.up * self.scale.to(self.up.dtype)


def _norms(x: Tensor, dim: int) -> Tensor:
    """Norms along a dimension, float64; in float32 alone where no square leaves its range."""
    norms: Tensor = torch.linalg.vector_norm(x, dim=dim)
    if not bool(((norms > 1e-15) & (norms < 1e15)).all()):
        norms = torch.linalg.vector_norm(x, dim=dim, dtype=torch.float64)
    return norms.double()
