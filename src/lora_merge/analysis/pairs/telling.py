"""Which modules say most of what two adapters are to each other, reduced module by module."""

from typing import Literal

import torch
from torch import Tensor

from lora_merge.analysis.pairs.overlap import PairTables

# Below this cosine adapters work against each other.
CONFLICT = -0.05
# Interference of unrelated adapters scatters around chance; this far above it, they meet.
ENTANGLED = 1.5
_MOST = 3


def entangled(overlaps: Tensor, chances: Tensor) -> Tensor:
    """Whether both spaces and the interference lie well above chance.

    Args:
        overlaps: Overlap of inputs, of outputs, and interference, shape (3, ...).
        chances: What random subspaces would show, the same shape.
    """
    return (overlaps > ENTANGLED * chances).all(dim=0)


class Telling:
    """For every pair the modules of the strongest conflict and of the strongest entanglement.

    Args:
        count: N, the number of adapters.
    """

    def __init__(self, count: int) -> None:
        self._labels: list[str] = []
        shape, kinds = (_MOST, count, count), ("conflict", "entangled")
        nothing = torch.full(shape, -torch.inf, dtype=torch.float64)
        self._scores = {kind: nothing.clone() for kind in kinds}
        self._places = {k: torch.zeros(shape, dtype=torch.int32) for k in self._scores}

    def add(self, label: str, tables: PairTables) -> None:
        """Take in one module."""
        norms = tables.products.diagonal().clamp_min(0).sqrt()
        cosine = tables.products / (norms[:, None] * norms).clamp_min(1e-300)
        excess = tables.interference / tables.chance_interference.clamp_min(1e-300)
        met = entangled(
            torch.stack([tables.overlap_in, tables.overlap_out, tables.interference]),
            torch.stack([tables.chance_in, tables.chance_out, tables.chance_interference]),
        )
        self._insert("conflict", torch.where(cosine < CONFLICT, -cosine, -torch.inf))
        self._insert("entangled", torch.where(met, excess, -torch.inf))
        self._labels.append(label)

    def _insert(self, kind: str, score: Tensor) -> None:
        scores = torch.cat([self._scores[kind], score[None]])
        place = torch.full_like(self._places[kind][:1], len(self._labels))
        places = torch.cat([self._places[kind], place])
        # Stable: of equals the module that came first.
        scores, order = scores.sort(dim=0, descending=True, stable=True)
        self._scores[kind] = scores[:_MOST]
        self._places[kind] = places.gather(0, order[:_MOST])

    def where(self, kind: Literal["conflict", "entangled"], i: int, j: int) -> tuple[str, ...]:
        """The most telling modules of a pair, at most three, the first first."""
        scores, places = self._scores[kind][:, i, j].tolist(), self._places[kind][:, i, j].tolist()
        return tuple(
            self._labels[place]
            for score, place in zip(scores, places, strict=True)
            if score > -torch.inf
        )
