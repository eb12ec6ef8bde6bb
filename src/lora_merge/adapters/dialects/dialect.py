"""What a dialect is: the rules by which one family of files is understood."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from lora_merge.adapters.base_weights import BaseModel
from lora_merge.adapters.config import AdapterConfig
from lora_merge.adapters.forms import ExtraSpec, ModuleSpec
from lora_merge.errors import AdapterError

Entries = Mapping[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Header:
    """All that a dialect may look at: names, shapes and metadata, and no tensor but a scalar.

    Attributes:
        adapter: The adapter's name, for messages.
        entries: Name → (safetensors dtype code, shape) of every tensor of the file.
        config: What `adapter_config.json` (or --alpha) says, None without either.
        metadata: The safetensors header's `__metadata__`.
        scalar: Value of a tensor with one entry.
        rank: The rank at which deltas of full rank are cut; None refuses them.
        base: The base model, where it is at hand.
    """

    adapter: str
    entries: Entries
    config: AdapterConfig | None
    metadata: Mapping[str, str]
    scalar: Callable[[str], float]
    rank: int | None = None
    base: BaseModel | None = None

    def base_shape(self, module: str) -> tuple[int, ...] | None:
        """Shape of a module's base weight as it is stored, None where it is not known."""
        return None if self.base is None else self.base.shape(module)

    def said(self) -> AdapterConfig:
        """The config.

        Raises:
            AdapterError: If there is none, so that the scaling is unknown.
        """
        if self.config is None:
            raise AdapterError(
                f"{self.adapter}: no adapter_config.json, so the scaling is unknown",
                "put the config beside the file, or give --alpha (and --rslora)",
            )
        return self.config


@dataclass(frozen=True)
class Claims:
    """What a dialect makes of a file. Every tensor has to be in one of the three tables.

    Attributes:
        config: The file's config in PEFT's terms, whatever the file itself says it in.
        modules: Adapted modules by canonical name; a tensor is claimed by the recipes it stands in.
        extras: Tensors that are whole parameters (biases, norms, modules saved whole), by
            canonical name.
        ignored: Tensors that change nothing → why, in words ("copies left by PEFT's wrappers").
        notes: Oddities that were understood, in words.
    """

    config: AdapterConfig
    modules: Mapping[str, ModuleSpec]
    extras: Mapping[str, ExtraSpec] = field(default_factory=dict)
    ignored: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Dialect:
    """One family of files.

    Attributes:
        name: In a word: "peft-lora".
        title: For messages and `info`.
        recognises: Whether a file is of this family, from its header alone.
        claim: Says what every tensor is. Raises an AdapterError that names the first tensor or
            field that this family knows and this library does not read.
        names_of_base: Whether its module names are those of the base model's files.
    """

    name: str
    title: str
    recognises: Callable[[Header], bool]
    claim: Callable[[Header], Claims]
    names_of_base: bool = True
