"""What a comparison says of all pairs over some modules, from the sums of their tables."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_merge.analysis.pairs.overlap import PairSums


@dataclass(frozen=True, eq=False)
class PairMatrices:
    """All pairs, over some modules; every matrix has shape (N, N), float64, and no NaN.

    Attributes:
        label: Which modules.
        modules: How many they are.
        norms: Frobenius norm of each adapter, shape (N,).
        shared: Modules that both have.
        cosine: <D_i, D_j> / (|D_i| |D_j|).
        overlap_out: Mean squared cosine of principal angles between output spaces.
        overlap_in: The same of input spaces.
        chance_out: What random subspaces would show.
        chance_in: The same for inputs.
        dimensions: Principal angles per module, on average.
        cosine_out: Largest principal cosine of output spaces, averaged.
        cosine_in: The same of input spaces.
        interference: Singular task interference over the sum of nuclear norms.
        chance_interference: What random subspaces with the same spectra would show.
        conflict: Share of entries whose signs differ.
        conflict_error: Standard error of that.
        conflict_mass: Share of min(|D_i|, |D_j|) that is in conflict.
        factor_a: Cosine of the raw A (0 for different ranks): shared initialisation shows here.
        factor_b: Cosine of the raw B.
        unit_match: Mean best match of the units of i among those of j; for i = j, in itself.
        cancellation: |D_i + D_j| / (|D_i| + |D_j|): 1 if they add up, 0 if they cancel.
        set_cancellation: The same of all adapters together.
        set_interference: Interference of all, over (N - 1)^2 and the sum of nuclear norms.
        angles_out: All principal cosines of the output spaces of one module, descending, shape
            (N, N, K), zero beyond `dimensions`; None where not asked for.
        angles_in: The same of the input spaces.
    """

    label: str
    modules: int
    norms: Tensor
    shared: Tensor
    cosine: Tensor
    overlap_out: Tensor
    overlap_in: Tensor
    chance_out: Tensor
    chance_in: Tensor
    dimensions: Tensor
    cosine_out: Tensor
    cosine_in: Tensor
    interference: Tensor
    chance_interference: Tensor
    conflict: Tensor
    conflict_error: Tensor
    conflict_mass: Tensor
    factor_a: Tensor
    factor_b: Tensor
    unit_match: Tensor
    cancellation: Tensor
    set_cancellation: float
    set_interference: float
    angles_out: Tensor | None = None
    angles_in: Tensor | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; principal cosines only where they were asked for."""
        document = {
            name: value.tolist() if isinstance(value, Tensor) else value
            for name, value in self.__dict__.items()
            if value is not None
        }
        sizes = self.dimensions.long().tolist()
        for name in {"angles_out", "angles_in"} & document.keys():
            document[name] = [
                [cosines[:size] for cosines, size in zip(*rows, strict=True)]
                for rows in zip(document[name], sizes, strict=True)
            ]
        return document


def matrices_of(label: str, sums: PairSums) -> PairMatrices:
    """What the sums of some modules' tables say, under a label."""
    total = sums.tables
    count = total["products"].shape[0]
    products = total["products"]
    norms = products.diagonal().clamp_min(0).sqrt()
    present, samples = total["present"], total["samples"]
    conflict = divide(total["conflicts"], samples)
    added = (products.diagonal()[:, None] + products.diagonal() + 2 * products).clamp_min(0).sqrt()
    nuclear = sums.nuclear * (count - 1) ** 2
    both = norms[:, None] * norms
    return PairMatrices(
        label=label,
        modules=sums.modules,
        norms=norms,
        shared=present,
        cosine=divide(products, both).clamp(-1, 1),
        overlap_out=divide(total["overlap_out"], present),
        overlap_in=divide(total["overlap_in"], present),
        chance_out=divide(total["chance_out"], present),
        chance_in=divide(total["chance_in"], present),
        dimensions=divide(total["dimensions"], present),
        cosine_out=divide(total["cosine_out"], present),
        cosine_in=divide(total["cosine_in"], present),
        interference=divide(total["interference"], total["nuclear"]),
        chance_interference=divide(total["chance_interference"], total["nuclear"]),
        conflict=conflict,
        conflict_error=divide(conflict * (1 - conflict), samples).sqrt(),
        conflict_mass=divide(total["conflict_mass"], total["mass"]),
        factor_a=_correlation(total["factor_a"]),
        factor_b=_correlation(total["factor_b"]),
        unit_match=divide(total["unit_match"], present),
        cancellation=divide(added, norms[:, None] + norms),
        set_cancellation=_ratio(math.sqrt(max(float(products.sum()), 0.0)), float(norms.sum())),
        set_interference=_ratio(sums.interference, nuclear),
    )


def divide(part: Tensor, whole: Tensor) -> Tensor:
    """`part / whole`, 0 where there is nothing."""
    return torch.where(whole > 0, part / whole.clamp_min(1e-300), 0.0)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def _correlation(products: Tensor) -> Tensor:
    norms = products.diagonal().clamp_min(0).sqrt()
    return divide(products, norms[:, None] * norms).clamp(-1, 1)
