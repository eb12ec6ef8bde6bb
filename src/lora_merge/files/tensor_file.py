"""Tensors in a file or in memory, behind one small lazy interface."""

import errno
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cache, lru_cache, reduce
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora_merge.errors import AdapterError
from lora_merge.files.header import CODES
from lora_merge.files.inputs import note_input

try:
    import resource
except ImportError:  # Windows has no such limit
    resource = None  # type: ignore[assignment]

DTYPES: dict[str, torch.dtype] = {code: getattr(torch, name) for name, code in CODES.items()}
DTYPE_CODES: dict[torch.dtype, str] = {dtype: code for code, dtype in DTYPES.items()}
# Places and marks that some formats store beside their factors.
_INTEGERS: dict[torch.dtype, str] = {
    torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64",
    torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64",
}  # fmt: skip
_OPEN_FILES = 100  # at once, at most
_LFS_MAGIC = b"version https://git-lfs"


class TensorSource(Protocol):
    """Where an adapter's tensors come from."""

    def entries(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """Name → (safetensors dtype code, shape) of every tensor; reads headers only."""
        ...

    def metadata(self) -> Mapping[str, str]:
        """What the file says beside its tensors."""
        ...

    def read(self, name: str) -> Tensor:
        """One tensor, as stored, on the CPU."""
        ...


class SafetensorsFile:
    """A safetensors file, opened once; opening reads the header alone.

    Tensors are read with `pread`, not mapped: a mapped file counts every page ever touched as the
    process's memory, which for 64 adapters is gigabytes, and a file truncated by somebody else
    would kill the process with SIGBUS.
    """

    def __init__(self, path: Path, adapter: str) -> None:
        self.path = path
        self.adapter = adapter
        refuse_pointer(path, adapter)
        note_input(path)
        try:
            self._identity = _identity(path)
            file = _opened(path, self._identity)
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            self._entries = {
                name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()
            }
            self._metadata: Mapping[str, str] = file.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise AdapterError(
                f"{adapter}: {path} is not a readable safetensors file: {error}",
                "download it again",
            ) from error

    def __reduce__(self) -> tuple[type, tuple[Path, str]]:
        """A copy, or what comes out of a pickle, opens the file by itself."""
        return SafetensorsFile, (self.path, self.adapter)

    def entries(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """Name → (dtype code, shape), from the header."""
        return self._entries

    def metadata(self) -> Mapping[str, str]:
        """The header's `__metadata__`."""
        return self._metadata

    def read(self, name: str) -> Tensor:
        """One tensor, as stored, on the CPU."""
        return read_tensor(self.path, name, self.adapter, self._identity)


def read_tensor(
    path: Path, name: str, adapter: str, identity: tuple[int, ...] | None = None
) -> Tensor:
    """One tensor of a safetensors file, as stored, on the CPU; its handle is kept for the next.

    Args:
        path: The file.
        name: The tensor.
        adapter: Whose it is, for messages.
        identity: What the file must be; None takes it as it is.

    Raises:
        AdapterError: If it cannot be read, or the file is another.
    """
    try:
        tensor: Tensor = _opened(path, identity or _identity(path)).get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"{adapter}: cannot read {name} from {path}: {error}",
            "the file changed or is damaged; download it again",
        ) from error
    return tensor


def _opened(path: Path, identity: tuple[int, ...]) -> Any:
    """A file's handle; opened again, it must be the same file.

    Raises:
        OSError: If the system refuses, or it is another file.
    """
    if _identity(path) != identity:
        raise OSError("it changed after it was opened")
    try:
        return _pool()(path, identity)
    except FileNotFoundError as error:  # what safetensors says where too many files are open
        if path.is_file():
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE)) from error
        raise


@cache
def _pool() -> Any:
    """Opens files and keeps the last ones open: of those that a process may open, a third."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if resource else _OPEN_FILES * 3
    size = _OPEN_FILES if limit < 0 else min(_OPEN_FILES, max(1, limit // 3))

    @lru_cache(maxsize=size)
    def opened(path: Path, identity: tuple[int, ...]) -> Any:
        return safe_open(str(path), framework="pt", backend="pread")

    return opened


def close_handles() -> None:
    """Close the files that are kept open; they are opened again when they are read again."""
    _pool().cache_clear()


def _identity(path: Path) -> tuple[int, ...]:
    stat = path.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


class TensorDict:
    """Tensors that are in memory already (a merge result, a loaded pickle)."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def entries(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """Name → (dtype code, shape); of other dtypes, torch's name."""
        codes = {**DTYPE_CODES, **_INTEGERS}
        return {
            name: (codes.get(t.dtype, str(t.dtype)), tuple(t.shape))
            for name, t in self._tensors.items()
        }

    def metadata(self) -> Mapping[str, str]:
        """None: tensors alone say nothing."""
        return {}

    def read(self, name: str) -> Tensor:
        """One tensor, as stored."""
        return self._tensors[name].cpu()


def load_pickle(path: Path, adapter: str) -> TensorDict:
    """Load a pickled checkpoint with `weights_only=True`; only after the user allowed pickles."""
    refuse_pointer(path, adapter)
    note_input(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds here, and all mean the same to the user
        raise AdapterError(
            f"{adapter}: {path} cannot be unpickled safely, it is no plain dictionary of tensors "
            f"({type(error).__name__})",
            "ask its author for a safetensors file",
        ) from error
    if not isinstance(loaded, dict) or not all(isinstance(t, Tensor) for t in loaded.values()):
        raise AdapterError(f"{adapter}: {path} is no plain dictionary of tensors", "convert it")
    return TensorDict(loaded)


def widest_dtype(codes: Iterable[str]) -> str:
    """The code of the narrowest dtype that holds all values of these."""
    return DTYPE_CODES[reduce(torch.promote_types, (DTYPES[code] for code in codes))]


def commonest_dtype(codes: Iterable[str]) -> str:
    """The code that occurs most often; the first by name of equals."""
    counts = Counter(sorted(codes))
    return max(counts, key=counts.__getitem__)


# Beyond this, squares of a factor leave the range of float32; trained weights are far below.
LARGEST_ENTRY = 1e15


def refuse_non_finite(tensor: Tensor, what: str) -> None:
    """Refuse NaN, infinite and absurdly large entries.

    Raises:
        AdapterError: Counting them, if there are any.
    """
    bad = int((~torch.isfinite(tensor)).sum())
    largest = 0.0 if bad or not tensor.numel() else float(tensor.abs().max())
    if bad or largest > LARGEST_ENTRY:
        found = f"{bad} NaN or infinite entries" if bad else f"entries up to {largest:.3g}"
        raise AdapterError(
            f"{what} has {found}",
            "the training diverged or the file is damaged; leave this adapter out",
        )


def refuse_pointer(path: Path, adapter: str) -> None:
    """Name a Git LFS pointer or an empty file as what it is."""
    try:
        with path.open("rb") as file:
            head = file.read(len(_LFS_MAGIC))
        size = path.stat().st_size
    except OSError as error:
        raise AdapterError(
            f"{adapter}: cannot read {path}: {error.strerror}", "check the path and its rights"
        ) from error
    if head == _LFS_MAGIC:
        raise AdapterError(
            f"{adapter}: {path} is a Git LFS pointer, not the weights",
            "run `git lfs pull` in its repository, or download the file from the Hub",
        )
    if size < 10:
        raise AdapterError(f"{adapter}: {path} is {size} bytes long, not weights", "get it again")
