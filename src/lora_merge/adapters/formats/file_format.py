"""What a file format is: the names, layouts and headers that one family of readers expects."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from lora_merge.adapters.forms import ModuleSpec, stored_shapes


class Written(Protocol):
    """What a format may look at: the adapter that will be written."""

    @property
    def modules(self) -> Mapping[str, ModuleSpec]:
        """Geometry of every module, by name."""

    @property
    def ranks(self) -> Mapping[str, int]:
        """Rank of every module."""

    @property
    def biases(self) -> tuple[str, ...]:
        """Modules whose B has a bias."""

    @property
    def config(self) -> Mapping[str, Any]:
        """What PEFT's `adapter_config.json` would say."""


def _as_they_are(spec: ModuleSpec, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return a, b


def _nothing(*_: object) -> dict[str, Any]:
    return {}


def _fine(plan: Written) -> None:
    pass


@dataclass(frozen=True)
class FileFormat:
    """One way to write an adapter whose scaling is folded into its factors.

    Attributes:
        name: In a word, for `--to`.
        title: For messages.
        naming: Whose module names it holds: formats and dialects of one naming understand each
            other's names.
        weights: Name of the weights file.
        keys: Names of A and B of a module.
        extra: Name of a tensor that is not a factor.
        bias: Name of B's bias, None where the format has none.
        shapes: Shapes of the stored A and B at a rank.
        arrange: From A and B in PEFT's layout (`forms.py`) to the stored ones.
        scalars: Numbers stored beside a module's factors, by name, at a rank.
        config: The `adapter_config.json` beside the weights, None for none.
        metadata: The safetensors header's `__metadata__`.
        check: Refuses what the format cannot hold.
        finish: Called with the closed file.
    """

    name: str
    title: str
    naming: str
    weights: str
    keys: Callable[[ModuleSpec], tuple[str, str]]
    extra: Callable[[str], str] = str
    bias: Callable[[str], str] | None = None
    shapes: Callable[[ModuleSpec, int], tuple[tuple[int, ...], tuple[int, ...]]] = stored_shapes
    arrange: Callable[[ModuleSpec, Tensor, Tensor], tuple[Tensor, Tensor]] = _as_they_are
    scalars: Callable[[ModuleSpec, int], Mapping[str, float]] = _nothing
    config: Callable[[Written], Mapping[str, Any] | None] = lambda plan: None
    metadata: Callable[[Written], Mapping[str, str]] = _nothing
    check: Callable[[Written], None] = _fine
    finish: Callable[[Path], None] | None = None
