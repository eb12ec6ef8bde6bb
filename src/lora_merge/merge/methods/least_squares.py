"""WUDI in closed form: a merge that minimises a sum of squares.

WUDI (arXiv 2503.08099) asks that the merged delta act like each adapter on the subspace that
adapter uses: min_X sum_i |(X - D_i) D_i^T|^2 / |D_i|^2. It is published as an iteration; the
minimiser is a linear solve: least squares with D_i^T D_i as a stand-in for the covariance of task
i's inputs, and, with sides exchanged, D_i D_i^T for that of its output gradients.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lora_merge.adapters.rank_stack import RankStack
from lora_merge.linalg.range_finder import cut_svd
from lora_merge.merge.methods.method import Job, Outcome
from lora_merge.merge.methods.spectral import (
    RTOL,
    flattened,
    share_of_energy,
    triplets,
    truncated_svd,
)
from lora_merge.options import option


@dataclass(frozen=True)
class WudiOptions:
    """Parameters of `wudi`."""

    side: Literal["input", "output", "both"] = option(
        "input",
        "whose subspaces must not be disturbed: the adapters' inputs (published) or outputs",
    )
    # Two checkpoints of one training run: at 0.01 small differences of their subspaces blow the
    # result up (norm 1.6 x the mean's on the input side), at 0.1 it is the mean within 6 %.
    ridge: float = option(
        0.1, "pull towards the plain sum, relative to the mean eigenvalue of the metric", above=0
    )
    compress: Literal["metric", "frobenius"] = option(
        "metric", "error that the cut to a rank minimises: the method's own, or the plain one"
    )
    beta: float = option(
        0.0,
        "0 leaves the singular values of the result, 1 makes them equal (norm kept, not published)",
        low=0,
        high=1,
    )


def wudi(stack: RankStack, job: Job, options: WudiOptions) -> Outcome:
    """The minimiser, cut to the rank asked for in the same metric (reduced-rank regression).

    With H = sum of output metrics, G = sum of input metrics and T the sum of the deltas, X solves
    H X + X G = sum_i (H_i D_i + D_i G_i), each metric with its ridge times (X - T). One side leaves
    one term, whose objective is |S^(1/2) (X - X*)|^2 plus a constant: the best X of a rank is then
    an SVD of S^(1/2) X*, not of X*.
    """
    parts = triplets(stack.weighted(job.weights))
    if options.side == "both":
        outcome = _both_sides(parts, _energy_shares(parts), job.rank, options.ridge)
    elif options.side == "output":
        outcome = _one_side(parts, job.rank, options, job.exact)
    else:
        outcome = _one_side(parts.transposed(), job.rank, options, job.exact)
        outcome = replace(outcome, stack=outcome.stack.transposed())
    # An adapter that is alone in a module disturbs nobody: it stays as it is.
    if options.beta == 0 or len(parts.adapters) < 2:
        return outcome
    return replace(outcome, stack=flattened(outcome.stack, options.beta))


@dataclass(frozen=True, eq=False)
class Target:
    """The minimiser X* of an output-side objective, in the metric of that objective.

    The objective of any X is |scaled - to_metric(X)|^2 plus a constant, so the best X of a rank, or
    within some span, is found by plain least squares on `scaled`.

    Attributes:
        root: Some L with L L^T = S, the sum of output metrics plus ridge, float64, shape (p, p);
            None for the plain error.
        scaled: L^T X*, shape (p, q).
    """

    root: Tensor | None
    scaled: Tensor

    def from_metric(self, left: Tensor) -> Tensor:
        """Columns of L^T X as columns of X, shape (p, n)."""
        if self.root is None:
            return left
        columns: Tensor = torch.linalg.solve_triangular(self.root.mT, left, upper=True)
        return columns

    def to_metric(self, left: Tensor) -> Tensor:
        """Columns of X as columns of L^T X."""
        return left if self.root is None else self.root.mT @ left


def output_target(
    parts: RankStack, ridge: float, compress: Literal["metric", "frobenius"] = "metric"
) -> Target:
    """The X that minimises sum_i |D_i^T (X - D_i)|^2 / |D_i|^2, ridge towards the sum.

    Args:
        parts: Singular triplets of every D_i, in core coordinates.
        ridge: Relative to the mean eigenvalue of the metric.
        compress: The error that is to be minimised by cuts.
    """
    share = _energy_shares(parts)
    metric = (parts.up * share) @ parts.up.mT
    # Deltas of zero: anything will do.
    mean = metric.diagonal().mean() if bool(metric.any()) else metric.new_ones(())
    pull = ridge * mean
    wanted = (parts.up * (parts.scale * (share + pull))) @ parts.down
    root = _triangular_root(metric, pull)
    half = torch.linalg.solve_triangular(root, wanted, upper=False)
    if compress == "metric":
        return Target(root, half)
    return Target(None, torch.linalg.solve_triangular(root.mT, half, upper=True))


def _triangular_root(metric: Tensor, pull: Tensor) -> Tensor:
    """Lower L with L L^T = metric + pull, float64: by Cholesky, or of a root where that fails."""
    lower: Tensor
    lower, info = torch.linalg.cholesky_ex(metric + pull * torch.eye(len(metric)).to(metric))
    if int(info) == 0:
        return lower
    values, vectors = torch.linalg.eigh(metric)
    root = (values.clamp_min(0) + pull).sqrt()[:, None] * vectors.mT
    lower = torch.linalg.qr(root, mode="r").R.mT
    return lower


def _energy_shares(parts: RankStack) -> Tensor:
    """Each triplet's share of its adapter's energy: H_i = U diag(share) U^T, shape (R,)."""
    energy = parts.scale.new_zeros(max(parts.adapters, default=0) + 1)
    energy.index_add_(0, parts.owner, parts.scale.square())
    return parts.scale.square() / energy.masked_fill(energy == 0, 1.0)[parts.owner]


def _one_side(parts: RankStack, rank: int | None, options: WudiOptions, exact: bool) -> Outcome:
    """The output-side minimiser, cut to a rank in its metric."""
    target = output_target(parts, options.ridge, options.compress)
    found = cut_svd(target.scaled, rank, exact=exact)
    alive = found.s > RTOL * found.s[:1]
    left = target.from_metric(found.u[:, alive])
    # Both parts of a cut in the metric are orthogonal in it, so their energies there add up.
    energy = float(found.s.square().sum()) / found.square if found.square > 0 else 1.0
    return Outcome(RankStack.single(left, found.vh[alive], found.s[alive]), energy=min(energy, 1.0))


def _both_sides(parts: RankStack, share: Tensor, rank: int | None, ridge: float) -> Outcome:
    """Input and output objective added: a Sylvester equation, solved in two eigenbases."""
    h_values, h_vectors = torch.linalg.eigh((parts.up * share) @ parts.up.mT)
    g_values, g_vectors = torch.linalg.eigh((parts.down.mT * share) @ parts.down)
    pull = ridge * (h_values.mean() + g_values.mean() if share.any() else 1.0)
    wanted = (parts.up * (parts.scale * (2 * share + pull))) @ parts.down
    weight = h_values.clamp_min(0)[:, None] + g_values.clamp_min(0) + pull
    solved = h_vectors.mT @ wanted @ g_vectors / weight.clamp_min(1e-300)
    u, s, vh = truncated_svd(h_vectors @ solved @ g_vectors.mT, None)
    return Outcome(
        RankStack.single(u[:, :rank], vh[:rank], s[:rank]), energy=share_of_energy(s[:rank], s)
    )
