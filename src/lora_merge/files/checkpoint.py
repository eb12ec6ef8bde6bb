"""A base model's directory: where its tensors lie, from the headers of its safetensors shards."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from lora_merge.errors import AdapterError, SourceError
from lora_merge.files.documents import read_json
from lora_merge.files.header import read_header
from lora_merge.files.inputs import note_input
from lora_merge.files.names import check_link, place_below
from lora_merge.files.tensor_file import DTYPES

# Models whose projections are GPT-2's Conv1D, which stores weights as (in, out).
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "gpt-sw3")
_CONV1D_NAMES = ("c_attn", "c_proj", "c_fc", "q_attn")
# Weights in other formats.
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".ot", ".ckpt")


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor lies: shard, safetensors dtype code, shape, offset in the file."""

    shard: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def read(self, file: IO[bytes], start: int, count: int) -> Tensor:
        """`count` entries from flat index `start` of the open shard, as stored, shape (count,).

        Moves no cursor, so threads may share the file.

        Raises:
            SourceError: If the file ends too early.
        """
        dtype = DTYPES[self.dtype]
        buffer = memoryview(bytearray(count * dtype.itemsize))
        offset, done = self.offset + start * dtype.itemsize, 0
        while done < len(buffer):
            read = os.preadv(file.fileno(), [buffer[done:]], offset + done)
            if not read:
                raise SourceError(f"{self.shard} is shorter than its header says", "get it again")
            done += read
        return torch.frombuffer(buffer, dtype=dtype) if count else torch.empty(0, dtype=dtype)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model directory, opened by its headers.

    Attributes:
        folder: The directory.
        shards: File names of its safetensors shards, in name order.
        index: Name of its index file, None for a single file.
        tensors: Every tensor's place, by name.
    """

    folder: Path
    shards: tuple[str, ...]
    index: str | None
    tensors: Mapping[str, TensorPlace]

    @property
    def paths(self) -> list[Path]:
        """Its shards."""
        return [self.folder / shard for shard in self.shards]

    @property
    def num_bytes(self) -> int:
        """Size of the shards."""
        return sum(path.stat().st_size for path in self.paths)

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """Its `config.json`; empty where there is none.

        Raises:
            SourceError: If it is no JSON.
        """
        path = self.folder / "config.json"
        # Some models' configs do hold Infinity (Mamba 2's time_step_limit).
        loaded = read_json(path, str(self.folder), finite=False) if path.is_file() else {}
        return loaded if isinstance(loaded, dict) else {}

    @cached_property
    def licence(self) -> str | None:
        """The licence that its model card names."""
        card = self.folder / "README.md"
        text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
        head = text.split("---")[1] if text.startswith("---") and text.count("---") > 1 else ""
        found = re.search(r"^license:\s*(\S+)\s*$", head, re.MULTILINE)
        return found[1] if found else None

    def other_files(self) -> list[Path]:
        """Relative paths of everything that is not weights: tokenizer, configs, code, licence.

        Raises:
            SourceError: If one of them is a link that leads out of the directory.
        """
        weights = {*self.shards, self.index}
        found = []
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder)
            hidden = any(part.startswith(".") for part in name.parts)
            stale = name.suffix in _OTHER_WEIGHTS or name.suffix == ".safetensors"
            stale |= name.name.endswith(".index.json")
            if path.is_file() and not hidden and not stale and str(name) not in weights:
                check_link(self.folder, path, str(self.folder))
                found.append(name)
        return found

    def read(self, name: str) -> Tensor:
        """One tensor as stored.

        Raises:
            AdapterError: If it is no float tensor.
        """
        place = self.tensors[name]
        if place.dtype not in DTYPES:
            raise AdapterError(
                f"{self.folder}: {name} is {place.dtype}, which is no plain float",
                "name the unquantised model",
            )
        with (self.folder / place.shard).open("rb") as file:
            return place.read(file, 0, prod(place.shape)).view(place.shape)

    def find(self, module: str) -> str | None:
        """Name of a module's weight, None if it is not there.

        A checkpoint may leave out the model's outermost name, or have one more than the adapter
        ("bert.encoder..." against "encoder..."), as transformers itself accepts.

        Raises:
            AdapterError: If several tensors could be meant.
        """
        wanted = f"{module}.weight"
        if wanted in self.tensors:
            return wanted
        longer = [name for name in self.tensors if name.endswith(f".{wanted}")]
        shorter = [name for name in self.tensors if wanted.endswith(f".{name}")]
        shorter = [n for n in shorter if n.count(".") >= wanted.count(".") - 1 and "." in n[:-7]]
        found = longer or shorter
        if len(found) > 1:
            raise AdapterError(
                f"{self.folder}: {module} could be {' or '.join(sorted(found)[:3])}",
                "is this the adapter's base model?",
            )
        return found[0] if found else None

    def is_conv1d(self, module: str) -> bool:
        """Whether a module is one of GPT-2's Conv1D, by the model's type and the module's name."""
        conv1d_model = self.config.get("model_type") in _CONV1D_MODELS
        return conv1d_model and module.rpartition(".")[2] in _CONV1D_NAMES


def open_checkpoint(path: Path) -> Checkpoint:
    """Read the headers of a model directory (or of a single safetensors file).

    Raises:
        SourceError: If it holds no complete safetensors checkpoint, or several.
    """
    note_input(path)
    if path.is_file():
        return Checkpoint(path.parent, (path.name,), None, read_places(path))
    if not path.is_dir():
        raise SourceError(f"{path}: no such directory", "give the base model's directory")
    indices = sorted(path.glob("*.safetensors.index.json"))
    files = sorted(file.name for file in path.glob("*.safetensors"))
    index = indices[0].name if len(indices) == 1 else None
    if len(indices) > 1 or (index is None and len(files) > 1):
        several = [file.name for file in indices] or files
        raise SourceError(
            f"{path}: several checkpoints: {', '.join(several[:4])}",
            "keep one of them in a directory of its own",
        )
    if index is not None:
        files = _indexed(path, index)
    elif not files:
        raise SourceError(
            f"{path}: no safetensors weights in this directory",
            "download the safetensors files, or convert with "
            "save_pretrained(safe_serialization=True)",
        )
    tensors: dict[str, TensorPlace] = {}
    for name in files:
        places = read_places(path / name)
        twice = sorted(tensors.keys() & places.keys())
        if twice:
            raise SourceError(f"{path}: {twice[0]} is in two shards", "get the model again")
        tensors |= places
    return Checkpoint(path, tuple(files), index, tensors)


def read_places(path: Path) -> dict[str, TensorPlace]:
    """Every tensor of a safetensors file, from its header.

    Raises:
        SourceError: If it is damaged or cut off.
    """
    header = read_header(path)
    return {
        name: TensorPlace(path.name, entry.dtype, entry.shape, header.data + entry.start)
        for name, entry in header.entries.items()
    }


def _indexed(folder: Path, index: str) -> list[str]:
    """The shards that an index names, all of which are there."""
    document = read_json(folder / index, str(folder))
    try:
        table = document["weight_map"]
        names = set(table.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"{folder / index} is no index of shards", "get it again") from error
    places = {name: place_below(folder, name, str(folder / index)) for name in names}
    files = sorted(places)
    missing = [name for name in files if not places[name].is_file()]
    if missing:
        raise SourceError(
            f"{folder}: {len(missing)} of {len(files)} shards are missing ({missing[0]}, ...)",
            "finish the download",
        )
    return files
