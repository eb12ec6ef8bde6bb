"""y += up^T (g * (down x)): the experts of a module, or of several that share an input, at once.

`reference.py` is the specification, `eager.py` plain PyTorch for any device, `fused.py` the Triton
kernels with gradients (`autograd.py`) and operators for torch.compile (`library.py`),
`grouped.py` those for many tokens that each keep few of many experts; `operation.py` is what to
call and `dispatch.py` decides which of them runs.
"""

from lora_merge.kernels.gate_rule import Rule, Value
from lora_merge.kernels.gated_stack.gate import activate, weights_of
from lora_merge.kernels.gated_stack.layout import Layout, Shrunk, Ungated, Units
from lora_merge.kernels.gated_stack.operation import (
    gated_expand,
    gated_shrink,
    gated_stack,
    routed_shrink,
)

__all__ = [
    "Layout",
    "Rule",
    "Shrunk",
    "Ungated",
    "Units",
    "Value",
    "activate",
    "gated_expand",
    "gated_shrink",
    "gated_stack",
    "routed_shrink",
    "weights_of",
]
