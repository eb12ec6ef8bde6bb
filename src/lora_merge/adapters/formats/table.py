"""All file formats, and which one an adapter of a dialect is written in."""

from collections.abc import Sequence
from typing import Protocol

from lora_merge.adapters.formats.diffusion import COMFYUI, DIFFUSERS, KOHYA
from lora_merge.adapters.formats.file_format import FileFormat
from lora_merge.adapters.formats.gguf import GGUF
from lora_merge.adapters.formats.mlx import MLX
from lora_merge.adapters.formats.peft import PEFT
from lora_merge.errors import AdapterError

FORMATS: dict[str, FileFormat] = {f.name: f for f in (PEFT, KOHYA, DIFFUSERS, COMFYUI, MLX, GGUF)}
# Dialects that have a format of their own; all others are written for PEFT.
_OWN = {"kohya": KOHYA, "diffusers": DIFFUSERS, "comfyui": COMFYUI, "mlx": MLX, "gguf": GGUF}


class Spoken(Protocol):
    """An adapter, as far as its dialect goes."""

    @property
    def name(self) -> str:
        """What messages call it."""

    @property
    def dialect(self) -> str:
        """Name of the dialect that it was read in."""


def format_of(adapters: Sequence[Spoken]) -> FileFormat:
    """The format of what is made of these adapters: their own where they share one, else PEFT's.

    Raises:
        AdapterError: If their dialects name modules in different ways.
    """
    owns = {adapter.dialect: _OWN.get(adapter.dialect, PEFT) for adapter in adapters}
    check_naming(adapters)
    formats = {own.name: own for own in owns.values()}
    return next(iter(formats.values())) if len(formats) == 1 else PEFT


def naming_of(adapter: Spoken) -> str:
    """Whose module names an adapter has."""
    return _OWN.get(adapter.dialect, PEFT).naming


def check_naming(adapters: Sequence[Spoken]) -> None:
    """Refuse adapters whose module names cannot be compared.

    Raises:
        AdapterError: Naming two of them.
    """
    by_naming = {naming_of(adapter): adapter for adapter in adapters}
    if len(by_naming) > 1:
        (one, a), (two, b) = sorted(by_naming.items())[:2]
        raise AdapterError(
            f"{a.name} names its modules as {one} does, {b.name} as {two} does",
            f"bring one to the other's names first: lora-merge convert --to {one}",
        )
