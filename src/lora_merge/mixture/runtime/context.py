"""What a forward pass of a model tells the modules that a mixture wraps."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lora_merge.mixture.gates.gate import GateSpec


@dataclass(eq=False)
class Context:
    """What a forward pass of the model tells its wrapped modules.

    Attributes:
        spec: The gate in force.
        active: Whether this mixture runs at all.
        bypass: True during the first pass of a two-pass gate.
        weights: Weights that do not depend on the module's input, shape (T', columns).
        mask: Which tokens count, bool, shape (B, S), or None.
        only: Expert that alone may act in each batch row, int64, shape (B,), or None.
        store: Decisions of this sequence (`sequence` gates); lives as long as its KV cache.
        observe: Called with (group, start, stop, weights (T', M, E), scores) of every gate.
    """

    spec: GateSpec
    active: bool = True
    bypass: bool = False
    weights: Tensor | None = None
    mask: Tensor | None = None
    only: Tensor | None = None
    store: dict[Any, Tensor] | None = None
    observe: Callable[[Any, int, int, Tensor, Tensor | None], None] | None = None
