"""What a file format is: the names, layouts and headers that one family of readers expects."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from lora_merge.adapters.forms import ModuleSpec, stored_shapes
from lora_merge.files.tensor_stream import SafetensorsStream, TensorStream, header_of

Entries = Mapping[str, tuple[str, tuple[int, ...]]]


class Written(Protocol):
    """What a format may look at: the adapter that will be written."""

    @property
    def modules(self) -> Mapping[str, ModuleSpec]:
        """Geometry of every module, by name."""

    @property
    def ranks(self) -> Mapping[str, int]:
        """Rank of every module."""

    @property
    def dtype(self) -> str:
        """Safetensors dtype code of the factors."""

    @property
    def extras(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """Tensors that are not factors."""

    @property
    def architecture(self) -> str | None:
        """llama.cpp's name of the model's architecture."""

    @property
    def biases(self) -> tuple[str, ...]:
        """Modules whose B has a bias."""

    @property
    def config(self) -> Mapping[str, Any]:
        """What PEFT's `adapter_config.json` would say."""


@dataclass(frozen=True)
class Container:
    """The kind of file that holds the tensors.

    Attributes:
        stream: Creates a file from its path, its entries and its metadata.
        header: Its head, the tensors' offsets and the file's size, from entries and metadata.
    """

    stream: Callable[[Path, Entries, Mapping[str, str]], TensorStream]
    header: Callable[[Entries, Mapping[str, str]], tuple[bytes, dict[str, int], int]]


SAFETENSORS = Container(SafetensorsStream, header_of)


def shapes_by_expert(spec: ModuleSpec, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of A and B of stacked experts where the expert stands first."""
    return (spec.num_experts, rank, spec.d_in), (spec.num_experts, spec.d_out, rank)


def by_expert(spec: ModuleSpec, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A and B of stacked experts from PEFT's layout to (E, r, in) and (E, out, r)."""
    count = spec.num_experts
    rank = a.shape[0] // count
    return a.reshape(count, rank, -1), b.reshape(len(b), rank, count).permute(2, 0, 1)


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
        metadata: What the file's header says.
        check: Refuses what the format cannot hold.
        finish: Called with the closed file.
        padded: Whether modules of smaller rank are filled up with zeros.
        container: The kind of file.
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
    padded: bool = True
    container: Container = SAFETENSORS
