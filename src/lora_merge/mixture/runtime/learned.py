"""What training may change of an attached gate, and what has become of it."""

from collections.abc import Sequence

from torch import Tensor, nn

from lora_merge.errors import MethodError
from lora_merge.mixture.gates.gate import GateSpec
from lora_merge.mixture.mixture import Mixture
from lora_merge.mixture.runtime.two_pass import HiddenGate
from lora_merge.mixture.runtime.wrapped.group import Group


def learned_parameters(
    spec: GateSpec, groups: Sequence[Group], classifier: HiddenGate | None
) -> list[nn.Parameter]:
    """Parameters of a gate: its classifier, or its rows in every module.

    Raises:
        MethodError: If the gate has none.
    """
    found = [g.weight for g in groups if g.weight is not None] if spec.signal == "input" else []
    if classifier is not None:
        found += list(classifier.parameters())
    if not found:
        raise MethodError(
            f"the {spec.preset} gate has nothing to train",
            "train xlora, recall, meteora, smora or phatgoose",
        )
    return found


def gate_tensors(
    mixture: Mixture, groups: Sequence[Group], classifier: HiddenGate | None
) -> dict[str, Tensor]:
    """A gate as it is now, by the names of the directory, float32 on the CPU."""
    if classifier is not None:
        return classifier.tensors()
    tensors = dict(mixture.gate)
    if mixture.spec.signal != "input" or mixture.spec.standardise:
        return tensors  # standardised rows are what runs; the file keeps the vectors themselves
    for group in groups:
        if group.weight is None:
            continue
        rows = group.weight.detach().float().cpu()
        for index, name in enumerate(group.names):
            part = rows[group.scores[index] : group.scores[index + 1]]
            tensors[f"{name}.weight"] = part.clone()
            if isinstance(group.bias, Tensor):
                bias = group.bias[group.units[index] : group.units[index + 1]]
                tensors[f"{name}.rank_bias"] = bias.cpu().clone()
    return tensors
