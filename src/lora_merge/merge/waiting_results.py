"""Results that wait on disk, for ranks that depend on all of them, or for those of other runs."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora_merge.adapters.rank_stack import RankStack
from lora_merge.errors import OutputError, SourceError
from lora_merge.files.documents import parse_json, validated
from lora_merge.files.tensor_stream import write_tensors
from lora_merge.merge.pipeline import Decomposed, Finished


@dataclass(frozen=True)
class Spool:
    """Folders with one file per module, which says everything that is known of its result.

    A file appears whole or not at all, so whatever is there is done.

    Attributes:
        folders: Where to look; the first is written to.
        keep: Leave a file where it is after it was taken.
    """

    folders: tuple[Path, ...]
    keep: bool = False
    _places: dict[str, Path] = field(default_factory=dict, repr=False)

    def put(
        self, module: str, results: Sequence[Decomposed | Finished], bias: Tensor | None = None
    ) -> None:
        """Store a module's results, one per expert, and what its bias adds. Safe from threads."""
        tensors: dict[str, Tensor] = {}
        numbers = []
        for expert, result in enumerate(results):
            whole = result
            if isinstance(result, Decomposed):
                whole = result.cut(result.units.num_units)
                tensors[f"{expert}.values"] = result.values.cpu()
                tensors[f"{expert}.cross"] = result.cross.cpu()
            assert isinstance(whole, Finished)
            tensors[f"{expert}.down"] = whole.stack.down.cpu().contiguous()
            tensors[f"{expert}.up"] = whole.stack.up.mT.cpu().contiguous()
            tensors[f"{expert}.scale"] = whole.stack.scale.cpu()
            numbers.append({one.name: getattr(whole, one.name) for one in fields(_Numbers)})
        if bias is not None:
            tensors["bias"] = bias
        self._write(module, tensors, {"numbers": json.dumps(numbers)})

    def take(self, module: str, rank: int) -> tuple[list[Finished], Tensor | None]:
        """A module's results at a rank, and its bias; frees its file unless it is to be kept."""
        results = []
        path = self._file(module)
        with _opened(path) as file:
            for expert, numbers in enumerate(_numbers(file)):
                scale = file.get_tensor(f"{expert}.scale")[:rank].clone()
                down, up = (file.get_slice(f"{expert}.{half}") for half in ("down", "up"))
                stack = RankStack.single(up[: len(scale)].mT, down[: len(scale)], scale)
                result = Finished(stack, **numbers)
                if f"{expert}.values" in file.keys():  # noqa: SIM118
                    values = file.get_tensor(f"{expert}.values")[:rank]
                    cross = file.get_tensor(f"{expert}.cross")[:rank]
                    square = float(values.square().sum())
                    result = replace(result, square=square, cross=float(cross.sum()))
                results.append(result)
            bias = file.get_tensor("bias") if "bias" in file.keys() else None  # noqa: SIM118
        if not self.keep:
            path.unlink()
        return results, bias

    def put_extra(self, name: str, tensor: Tensor) -> None:
        """Store a tensor that is not a factor."""
        self._write(_extra(name), {"extra": tensor})

    def extra(self, name: str) -> Tensor | None:
        """A tensor that is not a factor; None if none was stored."""
        path = self._file(_extra(name))
        if not path.exists():
            return None
        with _opened(path) as file:
            tensor: Tensor = file.get_tensor("extra")
        return tensor

    def has(self, module: str) -> bool:
        """Whether a module's result is there."""
        return self._file(module).exists()

    def has_extra(self, name: str) -> bool:
        """Whether a tensor that is not a factor is there."""
        return self.has(_extra(name))

    def spectrum(self, module: str) -> Tensor:
        """Singular values of a module; experts share a rank, so their squares add up."""
        with _opened(self._file(module)) as file:
            names = [f"{expert}.values" for expert in range(len(_numbers(file)))]
            spectra = [file.get_tensor(name) for name in names if name in file.keys()]  # noqa: SIM118
        size = max(len(values) for values in spectra)
        total = torch.zeros(size, dtype=torch.float64)
        for values in spectra:
            total[: len(values)] += values.square()
        return total.sqrt()

    def units(self, module: str) -> int:
        """Units of a module's results, the most of any expert."""
        with _opened(self._file(module)) as file:
            names = [f"{expert}.scale" for expert in range(len(_numbers(file)))]
            return max(int(file.get_slice(name).get_shape()[0]) for name in names)

    def packed(self) -> dict[str, bytes]:
        """All files as bytes, by name, to be sent elsewhere."""
        return {path.name: path.read_bytes() for path in self.folders[0].glob("*.part")}

    def receive(self, files: Mapping[str, bytes]) -> None:
        """Store what another process `packed`."""
        for name, data in files.items():
            part = (self.folders[0] / name).with_suffix(".tmp")
            with part.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            part.replace(self.folders[0] / name)

    def _write(
        self, key: str, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
    ) -> None:
        path = self.folders[0] / _name(key)
        part = path.with_suffix(".tmp")
        write_tensors(part, tensors, metadata)
        part.replace(path)

    def _file(self, key: str) -> Path:
        name = _name(key)
        if name not in self._places:
            places = [folder / name for folder in self.folders]
            found = [path for path in places if path.exists()]
            if not found:
                return places[0]
            self._places[name] = found[0]
        return self._places[name]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A module's file; who put it there may have been another run, long ago.

    Raises:
        OutputError: If it is not what `put` wrote.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except (SourceError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise OutputError(f"{path} is damaged: {error}", "--force begins again") from error


@dataclass(frozen=True)
class _Numbers:
    """`Finished` without its stack."""

    exact_norm: float
    square: float
    cross: float
    full_square: float
    adapter_squares: tuple[float, ...]
    details: dict[str, Any]
    exact_error: float


def _numbers(file: Any) -> list[dict[str, Any]]:
    """What is known of each expert's result, but its vectors."""
    text = parse_json(file.metadata()["numbers"], "its numbers", finite=False)
    return [vars(one) for one in validated(list[_Numbers], text, "its numbers")]


def _extra(name: str) -> str:
    return f"extra {name}"  # no module has a space in its path


def _name(key: str) -> str:
    # Names may be longer than a file name can be.
    return f"{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}.part"
