"""What a comparison says of all pairs over some modules, from the sums of their tables."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_merge.analysis.pairs.overlap import AVERAGED, PairMeasures, PairSums


@dataclass(frozen=True, eq=False, kw_only=True)
class PairMatrices(PairMeasures):
    """All pairs, over some modules; every matrix has shape (N, N), float64, and no NaN.

    What `PairMeasures` has is the average over the modules that both adapters have.

    Attributes:
        label: Which modules.
        modules: How many they are.
        norms: Frobenius norm of each adapter, shape (N,).
        shared: Modules that both have.
        cosine: <D_i, D_j> / (|D_i| |D_j|).
        interference: Singular task interference over the sum of nuclear norms.
        chance_interference: What random subspaces with the same spectra would show.
        conflict: Share of entries whose signs differ.
        conflict_error: Standard error of that.
        conflict_mass: Share of min(|D_i|, |D_j|) that is in conflict.
        factor_a: Cosine of the raw A (0 for different ranks): shared initialisation shows here.
        factor_b: Cosine of the raw B.
        cancellation: |D_i + D_j| / (|D_i| + |D_j|): 1 if they add up, 0 if they cancel.
        set_cancellation: The same of all adapters together.
        set_interference: Interference of all, over (N - 1)^2 and the sum of nuclear norms.
    """

    label: str
    modules: int
    norms: Tensor
    shared: Tensor
    cosine: Tensor
    interference: Tensor
    chance_interference: Tensor
    conflict: Tensor
    conflict_error: Tensor
    conflict_mass: Tensor
    factor_a: Tensor
    factor_b: Tensor
    cancellation: Tensor
    set_cancellation: float
    set_interference: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; principal cosines only where they were asked for."""
        document: dict[str, Any] = {"label": self.label, "modules": self.modules}
        document |= {
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
        **{name: divide(total[name], present) for name in AVERAGED},
        interference=divide(total["interference"], total["nuclear"]),
        chance_interference=divide(total["chance_interference"], total["nuclear"]),
        conflict=conflict,
        conflict_error=divide(conflict * (1 - conflict), samples).sqrt(),
        conflict_mass=divide(total["conflict_mass"], total["mass"]),
        factor_a=_correlation(total["factor_a"]),
        factor_b=_correlation(total["factor_b"]),
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
