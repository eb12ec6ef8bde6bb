"""Tensors of one adapter in a library, behind the interface that all adapters' tensors have."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lora_merge.adapters.library.index import Library, Member, Packed
from lora_merge.errors import AdapterError
from lora_merge.files.header import FileHeader, read_header
from lora_merge.files.tensor_file import read_tensor


@dataclass(frozen=True, eq=False)
class PackedTensors:
    """An adapter's tensors, each in the file of its module.

    Attributes:
        member: Which adapter of which library.
        adapter: What messages call it.
    """

    member: Member
    adapter: str

    @property
    def packed(self) -> Packed:
        """What the index says of it."""
        return self.member.packed

    def entries(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """Name → (dtype code, shape), from the header that its file had."""
        found = self.packed.layout.entries
        return {name: (entry.dtype, entry.shape) for name, entry in sorted(found.items())}

    def metadata(self) -> Mapping[str, str]:
        """What its file said beside its tensors."""
        return self.packed.layout.metadata

    def read(self, name: str) -> Tensor:
        """One tensor, as stored, on the CPU."""
        path = self.member.library.column(self.packed, name)
        tensor = read_tensor(path, self.packed.key(name), self.adapter)
        entry = self.packed.layout.entries[name]
        if tuple(tensor.shape) != entry.shape:
            raise AdapterError(
                f"{self.adapter}: {name} in {path} has another shape than in the index",
                "lora-merge pack --check says what is damaged; pack it again",
            )
        return tensor


@dataclass
class Pieces:
    """Reads tensors of libraries as bytes; keeps one file open."""

    path: Path | None = None
    header: FileHeader | None = None

    def read(self, library: Library, packed: Packed, tensor: str) -> bytes:
        """A tensor's bytes as they stood in the adapter's own file.

        Raises:
            AdapterError: If they are not there.
        """
        path = library.column(packed, tensor)
        if path != self.path:
            self.header, self.path = read_header(path), path
        assert self.header is not None
        wanted = packed.layout.entries[tensor]
        entry = self.header.entries.get(packed.key(tensor))
        if entry is None or (entry.dtype, entry.shape) != (wanted.dtype, wanted.shape):
            raise AdapterError(
                f"{packed.name}: {tensor} is not in {path} as the index says", "pack it again"
            )
        with path.open("rb") as file:
            file.seek(self.header.data + entry.start)
            return file.read(entry.end - entry.start)


def whole_file(member: Member) -> bytes:
    """The adapter's file as it was before it was packed.

    Raises:
        AdapterError: If it is not what was packed.
    """
    packed, pieces = member.packed, Pieces()
    parts = [pieces.read(member.library, packed, tensor) for tensor in packed.layout.entries]
    data = b"".join([packed.layout.head, *parts])
    if hashlib.sha256(data).hexdigest() != packed.sha256:
        raise AdapterError(
            f"{member.library.folder}:{packed.name} is not what was packed", "pack it again"
        )
    return data
