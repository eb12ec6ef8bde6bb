"""Random stacks with everything a gated stack needs, and how far from the reference one may be."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lora_merge.kernels.gate_rule import Rule
from lora_merge.kernels.gated_stack import reference
from lora_merge.kernels.gated_stack.layout import Layout
from lora_merge.kernels.gated_stack.operation import gated_expand, routed_shrink

# Relative to the largest entry of the sum of |terms|; half precision rounds units and factors.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True, eq=False)
class Stack:
    """One module's experts, or those of several members that share their input."""

    x: Tensor
    down: Tensor
    gate: Tensor
    ys: list[Tensor]
    ups: list[Tensor]
    layout: Layout
    rule: Rule
    bias: Tensor | None = None
    leaves: list[Tensor] = field(default_factory=list)

    def with_grad(self) -> "Stack":
        leaves = [t.clone().requires_grad_(True) for t in (self.x, self.down, self.gate)]
        ys = [y.clone().requires_grad_(True) for y in self.ys]
        ups = [up.clone().requires_grad_(True) for up in self.ups]
        x, down, gate = leaves
        return replace(self, x=x, down=down, gate=gate, ys=ys, ups=ups, leaves=[*leaves, *ys, *ups])

    def run(self, implementation: str) -> list[Tensor]:
        """Outputs of all members."""
        units = routed_shrink(
            self.x, self.down, self.gate, self.layout, self.rule, bias=self.bias,
            implementation=implementation,
        )  # fmt: skip
        return [
            gated_expand(y, part, up, implementation=implementation)
            for y, part, up in zip(self.ys, units, self.ups, strict=True)
        ]

    def expected(self) -> list[Tensor]:
        """The specification's outputs, float64, from the same (rounded) inputs."""
        members, units = self.layout.members, self.layout.num_units
        gates = self.gate.view(members, -1, self.gate.shape[1])
        biases = [None] * members if self.bias is None else list(self.bias.view(members, -1))
        outputs = []
        for m in range(members):
            weights = reference.routed_weights(self.x, gates[m], self.rule, biases[m])
            down = self.down[m * units : (m + 1) * units]
            outputs.append(
                reference.gated_stack(
                    self.x, self.ys[m], down, self.ups[m], weights, self.layout.columns
                )
            )
        return outputs


def owners(ranks: list[int]) -> Tensor:
    return torch.tensor([e for e, rank in enumerate(ranks) for _ in range(rank)], dtype=torch.int64)


def make_stack(
    tokens: int,
    ranks: list[int],
    *,
    d_in: int = 40,
    d_out: tuple[int, ...] = (30,),
    rule: Rule | None = None,
    bias: bool = False,
    dtype: torch.dtype = torch.float32,
    gate_dtype: torch.dtype | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> Stack:
    rule = rule or Rule()
    random = torch.Generator().manual_seed(seed)
    members, units, count = len(d_out), sum(ranks), len(ranks)
    scores = count + rule.null_row

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=random) * scale).to(device, dtype)

    block = ranks[0] if len(set(ranks)) == 1 else None
    return Stack(
        x=draw(tokens, d_in),
        down=draw(members * units, d_in, scale=d_in**-0.5),
        gate=draw(members * scores, d_in, scale=d_in**-0.5).to(gate_dtype or dtype),
        ys=[draw(tokens, width) for width in d_out],
        ups=[draw(units, width) for width in d_out],
        layout=Layout(owners(ranks).to(device), count, block, members),
        rule=rule,
        bias=torch.randn(members * scores, generator=random).to(device) if bias else None,
    )


def assert_near(got: Tensor, expected: Tensor, dtype: torch.dtype, scale: float = 0.0) -> None:
    """Nearer than the dtype's tolerance times the largest entry."""
    assert got.shape == expected.shape
    if not got.numel():
        return
    got, expected = got.detach().double(), expected.detach().double()
    assert got.isfinite().all()
    largest = max(float(expected.abs().max()), scale, 1.0)
    error = float((got - expected).abs().max())
    assert error <= TOLERANCE[dtype] * largest, f"{error:.2e} of {largest:.2e}"
