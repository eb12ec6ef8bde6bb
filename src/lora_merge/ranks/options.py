"""How ranks are chosen, beside the rule itself; plain data, from which the command is made."""

import os
from dataclasses import dataclass
from typing import Literal

from lora_merge.errors import ArgumentError
from lora_merge.options import option

Objective = Literal["absolute", "relative", "base-relative"]


@dataclass(frozen=True, kw_only=True)
class RankOptions:
    """Limits of the ranks, and what a budget minimises."""

    min_rank: int = option(1, "smallest rank", low=1)
    max_rank: int | None = option(None, "largest rank", low=1)
    round_to: int = option(
        1, "ranks become multiples of this, rounded up, where a module has that many", low=1
    )
    drop_empty: bool = option(False, "let a module have rank 0 and drop it")
    exact: bool = option(False, "spread a budget by dynamic programming instead of water-filling")
    objective: Objective = option(
        "absolute",
        "what budget and match minimise: squared error, or that over the delta's or the base "
        "weight's norm",
    )
    base: str | os.PathLike[str] | None = option(None, "base model's directory, for base-relative")
    bottleneck: str | os.PathLike[str] | None = option(
        None,
        "statistics file: keep output energy on calibration data instead of sum s^2",
        metavar="STATS",
    )
    fisher: str | os.PathLike[str] | None = option(
        None, "the same, outputs weighted by their Fisher information", metavar="STATS"
    )

    def __post_init__(self) -> None:
        """Refuse what excludes one another."""
        if self.drop_empty and self.min_rank > 1:
            raise ArgumentError("drop_empty allows rank 0, min_rank does not", "give one of them")
        if self.max_rank is not None and self.min_rank > self.max_rank:
            raise ArgumentError("min_rank is above max_rank", "correct one of them")
        if self.bottleneck is not None and self.fisher is not None:
            raise ArgumentError("bottleneck and fisher are two statistics files", "give one")
        if self.objective == "base-relative" and self.base is None:
            raise ArgumentError("objective base-relative needs the base model", "give its base")

    @property
    def smallest(self) -> int:
        """The smallest rank that a module may have."""
        return 0 if self.drop_empty else self.min_rank
