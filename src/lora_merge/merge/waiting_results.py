"""Results that wait on disk until their ranks are chosen: ranks may depend on all modules."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from lora_merge.adapters.rank_stack import RankStack
from lora_merge.files.tensor_stream import write_tensors
from lora_merge.merge.pipeline import Decomposed, Finished


@dataclass(frozen=True, eq=False)
class Piece:
    """One result without its vectors.

    Attributes:
        whole: The uncut result's numbers; its stack is on disk.
        values: Singular values, None where the result is not cut.
        cross: Inner product of each singular unit with the exact sum.
    """

    whole: Finished
    values: Tensor | None
    cross: Tensor | None


@dataclass(frozen=True)
class Spool:
    """A folder with one file per module, one pair of factors per expert.

    Attributes:
        folder: Where the files are.
        pieces: Module → one piece per expert.
    """

    folder: Path
    pieces: dict[str, list[Piece]] = field(default_factory=dict)

    def put(self, module: str, results: Sequence[Decomposed | Finished]) -> None:
        """Store a module's results. Safe from several threads, one module each."""
        tensors: dict[str, Tensor] = {}
        pieces = []
        for expert, result in enumerate(results):
            if isinstance(result, Decomposed):
                whole = result.cut(result.units.num_units)
                pieces.append(Piece(_emptied(whole), result.values.cpu(), result.cross.cpu()))
            else:
                whole = result
                pieces.append(Piece(_emptied(whole), None, None))
            tensors[f"{expert}.down"] = whole.stack.down.cpu().contiguous()
            tensors[f"{expert}.up"] = whole.stack.up.mT.cpu().contiguous()
            tensors[f"{expert}.scale"] = whole.stack.scale.cpu()
        self.pieces[module] = pieces
        write_tensors(self._file(module), tensors)

    def take(self, module: str, rank: int) -> list[Finished]:
        """A module's results at a rank; frees its file."""
        tensors = load_file(self._file(module))
        results = []
        for expert, piece in enumerate(self.pieces[module]):
            down, up = tensors[f"{expert}.down"][:rank], tensors[f"{expert}.up"][:rank].mT
            stack = RankStack.single(up, down, tensors[f"{expert}.scale"][:rank])
            result = replace(piece.whole, stack=stack)
            if piece.values is not None and piece.cross is not None:
                square = float(piece.values[:rank].square().sum())
                result = replace(result, square=square, cross=float(piece.cross[:rank].sum()))
            results.append(result)
        self._file(module).unlink()
        return results

    def spectrum(self, module: str) -> Tensor:
        """Singular values of a module; experts share a rank, so their squares add up."""
        spectra = [piece.values for piece in self.pieces[module] if piece.values is not None]
        size = max(len(values) for values in spectra)
        total = torch.zeros(size, dtype=torch.float64)
        for values in spectra:
            total[: len(values)] += values.square()
        return total.sqrt()

    def units(self, module: str) -> int:
        """Units of a module's results, the most of any expert."""
        return max(piece.whole.stack.owner.numel() for piece in self.pieces[module])

    def _file(self, module: str) -> Path:
        # Names may be longer than a file name can be.
        return self.folder / f"{hashlib.blake2b(module.encode(), digest_size=16).hexdigest()}.part"


def _emptied(result: Finished) -> Finished:
    """The numbers of a result; vectors of width 0 remember how many units there are."""
    stack = result.stack
    empty = RankStack(stack.down[:, :0].clone(), stack.up[:0].clone(), stack.scale, stack.owner)
    return replace(result, stack=empty)
