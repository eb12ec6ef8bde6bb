"""From what a caller asks for to the gate in force."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lora_merge.errors import MethodError
from lora_merge.mixture.gates.gate import GateSpec
from lora_merge.mixture.gates.named_weights import weight_row
from lora_merge.mixture.mixture import Mixture
from lora_merge.mixture.runtime.call.bank import Bank
from lora_merge.mixture.runtime.call.in_force import InForce

Weights = Mapping[str, float] | Sequence[float]
Request = str | Mapping[str, float] | None
_CHANGEABLE = ("top_k", "temperature", "scale", "value", "null_score")
_SHORTCUTS = ("freeze_after", "lagged")


def names_in(weights: Weights | None, requests: Sequence[Request] | None) -> Iterator[str]:
    """The experts that a caller names."""
    for asked in (weights, *(requests or ())):
        if isinstance(asked, str):
            yield asked
        elif isinstance(asked, Mapping):
            yield from asked


def gate_asked_for(
    mixture: Mixture,
    bank: Bank,
    device: torch.device,
    *,
    weights: Weights | None = None,
    requests: Sequence[Request] | None = None,
    settings: Mapping[str, Any],
) -> InForce:
    """The gate in force that a caller wants.

    Args:
        mixture: What is attached.
        bank: The experts that are to run.
        device: Where they are.
        weights: Fixed weights, by expert's name (others 0) or one per expert.
        requests: One expert's name, weights by name, or None (base model) for each batch row.
        settings: Of the mixture's own gate; for two passes also `freeze_after` and `lagged`.

    Raises:
        MethodError: If that is several things, nothing, or names what is not there.
    """
    own, names = mixture.spec, bank.names
    known = (*_CHANGEABLE, *(_SHORTCUTS if own.signal == "hidden" else ()))
    shortcuts = {name: settings[name] for name in known[len(_CHANGEABLE) :] if name in settings}
    changes = {name: value for name, value in settings.items() if name not in shortcuts}
    for name in changes:
        if name not in known:
            raise MethodError(f"set_gate: {name} is part of the mixture", "make a new mixture")
    if sum((weights is not None, requests is not None, bool(changes))) > 1:
        raise MethodError("set_gate: weights, requests or settings, not several", "choose one")
    if weights is not None:
        rows, spec = [weight_row(names, weights)], GateSpec("constant", "constant", "model")
    elif requests is not None:
        rows = [weight_row(names, request) for request in requests]
        spec = GateSpec("request", "request", "model")
        if not rows:
            raise MethodError("set_gate: no requests", "name one expert per row, or None")
    elif own.signal in ("constant", "request"):
        spec, nothing = own, [0.0] * len(names)
        rows = [list(own.weights) if own.signal == "constant" else nothing]
    else:
        return InForce(replace(own, **changes), bank=bank, **shortcuts)
    value = torch.tensor(rows, dtype=torch.float32, device=device) * spec.factor(len(names))
    zero = not any(any(row) for row in rows)
    return InForce(spec, _tiled(mixture, value), zero, bank=bank, **shortcuts)


def _tiled(mixture: Mixture, rows: Tensor) -> Tensor:
    """The same weights in every module, where each has columns of its own."""
    spec = mixture.spec
    per_module = spec.signal == "hidden" and spec.granularity == "module"
    return rows.repeat(1, len(mixture.modules)) if per_module else rows
