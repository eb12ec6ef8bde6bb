"""What a mixture costs, from shapes alone."""

from dataclasses import asdict, dataclass
from typing import Any

from lora_merge.mixture.mixture import Mixture


@dataclass(frozen=True)
class Overhead:
    """Size and work of a mixture beside its base model.

    Attributes:
        modules: Wrapped modules.
        units: R summed over modules.
        max_units: The largest R of one module.
        expert_parameters: Entries of all factors.
        gate_parameters: Entries of the gate.
        base_parameters: Entries of the wrapped modules' weights.
        bytes: Of experts and gate, at `itemsize`.
        percent: Multiply-adds per token, of those of the wrapped modules; the same number is the
            share of bytes when decoding one token.
        passes: Passes of the base model per token: 2 for an exact two-pass gate.
    """

    modules: int
    units: int
    max_units: int
    expert_parameters: int
    gate_parameters: int
    base_parameters: int
    bytes: int
    percent: float
    passes: int

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


def overhead(mixture: Mixture, *, itemsize: int = 4) -> Overhead:
    """Count a mixture's parameters and work: R (d_in + d_out) per module against d_in d_out.

    Args:
        mixture: The mixture.
        itemsize: Bytes of one entry at run time.
    """
    modules = mixture.alignment.modules
    experts = sum(m.num_units * (m.first.d_in + m.first.d_out) for m in modules)
    base = sum(m.first.d_in * m.first.d_out for m in modules if m.first.form != "embedding")
    gate = sum(tensor.numel() for tensor in mixture.gate.values())
    looked_up = sum(
        m.num_units * m.first.d_in for m in modules if m.first.form == "embedding"
    )  # an embedding reads one column of A, not all
    work = experts - looked_up + gate
    return Overhead(
        modules=len(modules),
        units=sum(m.num_units for m in modules),
        max_units=max(m.num_units for m in modules),
        expert_parameters=experts,
        gate_parameters=gate,
        base_parameters=base,
        bytes=(experts + gate) * itemsize,
        percent=100.0 * work / base if base else 0.0,
        passes=2 if mixture.spec.signal == "hidden" else 1,
    )
