"""The SVD of `up @ down` kept as R x R matrices, so that vectors cost nothing until wanted."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_merge.linalg.factors import CONDITION_FOR_VALUES, cholesky, gram


@dataclass(frozen=True, eq=False)
class CoreSVD:
    """SVD of a product `up @ down`, `up` of shape (m, R) and `down` of shape (R, n).

    With up = Q_u R_u and down^T = Q_d R_d, the SVD of the core R_u R_d^T = U S V^T gives
    u = Q_u U = up R_d^T V / S and v^T = U^T R_u down / S: no triangular factor is inverted, and
    the error of a kept direction is that of one GEMM.

    Attributes:
        values: Singular values, descending, float64, shape (k,), k = min(m, n, R).
        left: R_d^T V, float64, shape (R, k): `up @ left` has columns u_i * values[i].
        right: U^T R_u, float64, shape (k, R): `right @ down` has rows v_i^T * values[i].
    """

    values: Tensor
    left: Tensor
    right: Tensor

    def truncate(self, rank: int) -> tuple[Tensor, Tensor]:
        """R x R matrices of the best approximation of a rank (Eckart-Young), balanced.

        Args:
            rank: Directions to keep; those with singular value 0 come out as zeros.

        Returns:
            l of shape (R, rank) and r of shape (rank, R), float64, so that
            `(up @ l) @ (r @ down)` is the approximation and both halves have norms sqrt(values).
        """
        values = self.values[:rank]
        root = torch.where(values > 0, values.clamp_min(1e-300).rsqrt(), 0.0)
        return self.left[:, :rank] * root, root[:, None] * self.right[:rank]


def core_svd(up: Tensor, down: Tensor) -> CoreSVD:
    """SVD of `up @ down` in float64 from the factors, in O((m + n) R^2).

    Args:
        up: Shape (m, R), any float dtype, finite.
        down: Shape (R, n), any float dtype, finite.
    """
    r_up, r_down = _triangular(up), _triangular(down.mT)
    u, s, vh = torch.linalg.svd(r_up @ r_down.mT, full_matrices=False)
    return CoreSVD(values=s, left=r_down.mT @ vh.mT, right=u.mT @ r_up)


def _triangular(x: Tensor) -> Tensor:
    """R of a QR of `x` (m, n), float64: by Cholesky where that is as accurate, else Householder."""
    if x.shape[0] >= x.shape[1] > 0:
        lower, condition = cholesky(gram(x.mT))
        if condition <= CONDITION_FOR_VALUES:
            return lower.mT
    householder: Tensor = torch.linalg.qr(x.to(torch.float64), mode="r").R
    return householder
