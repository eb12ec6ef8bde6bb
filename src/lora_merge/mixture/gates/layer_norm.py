"""PHATGOOSE compares an input and a gate vector after LayerNorm (arXiv 2402.05859)."""

import torch
from torch import Tensor
from torch.nn import functional


def inverse_deviation(x: Tensor) -> Tensor:
    """1 / std of every token as LayerNorm divides by it, float32, shape (T,)."""
    flat = x.reshape(-1, x.shape[-1]).float()
    deviation: Tensor = torch.rsqrt(flat.var(dim=-1, correction=0) + 1e-5)
    return deviation


def standardised_rows(rows: Tensor) -> Tensor:
    """Rows whose plain product with x, over the deviation of x, is LN(row) . LN(x) / sqrt(d).

    A standardised row sums to zero, so the mean of x drops out (PHATGOOSE, arXiv 2402.05859).
    """
    width = rows.shape[-1]
    centred: Tensor = functional.layer_norm(rows.double(), (width,))
    return centred.div(width**0.5).to(rows.dtype)
