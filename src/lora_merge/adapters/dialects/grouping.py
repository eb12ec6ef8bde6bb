"""The tensors of one module under the names its format gives them, and how they become a spec."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import NoReturn

from torch import Tensor

from lora_merge.adapters.dialects.dialect import Header
from lora_merge.adapters.forms import ModuleSpec
from lora_merge.adapters.units import Recipe, Units, Verdict
from lora_merge.errors import AdapterError
from lora_merge.files.tensor_file import DTYPES, widest_dtype


@dataclass(frozen=True)
class Group:
    """What a file stores for one module.

    Attributes:
        header: The file.
        module: The module's name.
        keys: Part of the format ("lora_up", "hada_w1_a", "alpha") → tensor name in the file.
    """

    header: Header
    module: str
    keys: Mapping[str, str]

    def __contains__(self, part: str) -> bool:
        return part in self.keys

    def shape(self, part: str, *dims: int) -> tuple[int, ...]:
        """A tensor's shape; refuses a missing one, and one with none of these numbers of axes."""
        if part not in self.keys:
            self._refuse_missing(part)
        shape = self.header.entries[self.keys[part]][1]
        if (dims and len(shape) not in dims) or 0 in shape:
            self.refuse("a tensor is empty or has the wrong number of axes", "save it again")
        return shape

    def _refuse_missing(self, part: str) -> NoReturn:
        self.refuse(f"{part} is missing", "the file is incomplete; save or download it again")

    def check(self, fits: bool) -> None:
        """Refuse shapes that do not belong together."""
        if not fits:
            self.refuse("the shapes do not belong together", "save or download it again")

    def refuse(self, why: str, remedy: str) -> NoReturn:
        """Refuse the file because of this module; names it and every shape.

        Raises:
            AdapterError: Always.
        """
        shapes = ", ".join(
            f"{part} {list(self.header.entries[key][1])}" for part, key in sorted(self.keys.items())
        )
        raise AdapterError(f"{self.header.adapter}: {self.module}: {why} ({shapes})", remedy)

    def dtype(self, *keys: str) -> str:
        """The dtype that holds these tensors; refuses integers where factors are wanted."""
        codes = [self.header.entries[key][0] for key in keys]
        for key, code in zip(keys, codes, strict=True):
            if code not in DTYPES:
                self.refuse(f"{key} has dtype {code}", "dequantise the adapter first")
        return widest_dtype(codes)

    def alpha(self, rank: int) -> float:
        """Alpha / rank; 1 where alpha is missing or zero, as every reader of such files has it."""
        stored = self.header.scalar(self.keys["alpha"]) if "alpha" in self.keys else 0.0
        if abs(stored) >= 1e15 or stored != stored:
            self.refuse(f"no usable alpha ({stored})", "correct it")
        return stored / rank if stored else 1.0

    def spec(
        self,
        parts: tuple[str, ...],
        units: Callable[..., Units] | None,
        *,
        d_out: int,
        d_in: int,
        rank: int,
        scaling: float = 1.0,
        kernel: tuple[int, ...] = (),
        verdict: Verdict = "exact",
        needs_base: bool = False,
        whole_norm: Callable[..., float] | None = None,
    ) -> ModuleSpec:
        """A linear layer or convolution made of some parts.

        Args:
            parts: In the order in which `units` takes them; a name without a dot that is no part
                of the group is a key of the file that modules share.
            units: Gives A (rank, d_in) and B (d_out, rank); None: the two parts are A and B.
            d_out: Rows of the delta.
            d_in: Columns of the delta, kernel positions included.
            rank: Units that come out.
            scaling: Multiplies B @ A.
            kernel: Kernel of a convolution.
            verdict: How exact it is.
            needs_base: Whether `units` takes the base weight.
            whole_norm: Norm of the whole delta, where `units` gives a part of it.
        """
        keys = tuple(self.keys.get(part, part) for part in parts)
        lost = next((key for key in keys if key not in self.header.entries), None)
        if lost is not None:
            self._refuse_missing(lost)
        places = [key for key in keys if "indices" in key]
        for key in places:
            if self.header.entries[key][0][0] not in "IU":
                self.refuse(f"{key} has dtype {self.header.entries[key][0]}", "save it again")
        dtype = self.dtype(*(key for key in keys if key not in places))
        if units is None:
            recipe = Recipe(keys)
        else:
            if kernel:
                units = partial(_as_convolution, units, kernel)
            recipe = Recipe(keys, units, verdict, needs_base, whole_norm)
        return ModuleSpec(
            name=self.module,
            form="conv" if kernel else "linear",
            d_out=d_out,
            d_in=d_in,
            rank=rank,
            scaling=scaling,
            dtype=dtype,
            recipe=recipe,
            kernel=kernel,
        )


def _as_convolution(
    units: Callable[..., Units], kernel: tuple[int, ...], *tensors: Tensor, **base: object
) -> Units:
    """A and B of a convolution in its stored layout."""
    a, b = units(*tensors, **base)
    ones = (1,) * len(kernel)
    return a.reshape(len(a), a.shape[1] // prod(kernel), *kernel), b.reshape(*b.shape, *ones)
