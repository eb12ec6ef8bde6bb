"""What one adapted module is, and how its stored tensors become factor matrices and back.

| form      | stored A                       | stored B             | matrix product B @ A      |
| --------- | ------------------------------ | -------------------- | ------------------------- |
| linear    | (r, in)                        | (out, r)             | (out, in)                 |
| conv      | (r, in, *kernel)               | (out, r, 1, ...)     | (out, in * prod(kernel))  |
| embedding | (r, vocabulary)                | (dim, r)             | weight delta transposed   |
| experts   | (E * r, in), expert-major      | (out, r * E), expert | one (out, in) per expert  |
|           |                                | index fastest        |                           |
"""

from dataclasses import dataclass
from math import prod
from typing import Literal

from torch import Tensor

from lora_merge.adapters.units import Recipe

Form = Literal["linear", "conv", "embedding", "experts"]


@dataclass(frozen=True)
class ModuleSpec:
    """One adapted module of one adapter, from the file's header and the config.

    Attributes:
        name: Full path in the base model: of the module, or of a parameter of stacked experts.
        form: How the factors are stored.
        d_out: Rows of the factor product.
        d_in: Columns of the factor product (kernel positions included).
        rank: r.
        scaling: What multiplies B @ A.
        dtype: safetensors dtype code that holds the factors as stored.
        recipe: How the stored tensors become A and B.
        kernel: Kernel shape of a convolution, otherwise ().
        num_experts: E of a 3-D expert parameter, otherwise 1.
        key_bias: Tensor name of B's bias (`lora_bias`), or None.
        parameter: Own name of the parameter that is adapted instead of a module, or None.
        wrapper: Where PEFT has its factors in a file to be written; None: at its name.
    """

    name: str
    form: Form
    d_out: int
    d_in: int
    rank: int
    scaling: float
    dtype: str
    recipe: Recipe
    kernel: tuple[int, ...] = ()
    num_experts: int = 1
    key_bias: str | None = None
    parameter: str | None = None
    wrapper: str | None = None

    @property
    def geometry(self) -> tuple[Form, int, int, tuple[int, ...], int]:
        """What must agree for two adapters to be stacked on this module."""
        return (self.form, self.d_out, self.d_in, self.kernel, self.num_experts)

    @property
    def tensor(self) -> str:
        """Name of the base model's tensor that is changed."""
        return f"{self.name}.weight" if self.parameter in (None, "weight") else self.name

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of all stored tensors that this module is made of."""
        return self.recipe.keys if self.key_bias is None else (*self.recipe.keys, self.key_bias)

    @property
    def num_parameters(self) -> int:
        """Entries of A and B together."""
        return self.num_experts * self.rank * (self.d_in + self.d_out)


@dataclass(frozen=True)
class ExtraSpec:
    """A tensor that is not a low-rank factor: a bias, or a tensor of a module saved whole.

    Attributes:
        name: Name in the base model.
        key: Name in the file.
        dtype: safetensors dtype code.
        shape: Its shape.
    """

    name: str
    key: str
    dtype: str
    shape: tuple[int, ...]


def stored_shapes(spec: ModuleSpec, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the A and B tensors this module has in a file at the given rank."""
    if spec.form == "conv":
        ones = (1,) * len(spec.kernel)
        return (rank, spec.d_in // prod(spec.kernel), *spec.kernel), (spec.d_out, rank, *ones)
    rows = rank * spec.num_experts
    return (rows, spec.d_in), (spec.d_out, rows)


def to_matrix(spec: ModuleSpec, a: Tensor, b: Tensor, expert: int) -> tuple[Tensor, Tensor]:
    """Views of stored tensors as A (r, d_in) and B (d_out, r) of one expert (0 if there is one)."""
    a = a.reshape(spec.num_experts, spec.rank, spec.d_in)[expert]
    b = b.reshape(spec.d_out, spec.rank, spec.num_experts)[:, :, expert]
    return a, b


def to_stored(
    spec: ModuleSpec, factors: list[tuple[Tensor, Tensor]], rank: int
) -> tuple[Tensor, Tensor]:
    """Stored A and B from one (A, B) pair per expert, zero-padded to `rank`."""
    first_a, first_b = factors[0]
    shape_a, shape_b = stored_shapes(spec, rank)
    if spec.num_experts == 1 and first_a.shape[0] == rank:
        return first_a.reshape(shape_a), first_b.reshape(shape_b)
    a = first_a.new_zeros(spec.num_experts, rank, spec.d_in)
    b = first_b.new_zeros(spec.d_out, rank, spec.num_experts)
    for expert, (part_a, part_b) in enumerate(factors):
        a[expert, : part_a.shape[0]] = part_a
        b[:, : part_b.shape[1], expert] = part_b
    return a.reshape(shape_a), b.reshape(shape_b)
