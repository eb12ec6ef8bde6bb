"""Weights that no module decides for itself: the caller has named them, or a first pass has."""

import torch
from torch import Tensor

from lora_merge.errors import MethodError
from lora_merge.mixture.runtime.call.modules import Modules
from lora_merge.mixture.runtime.call.passes import Pass
from lora_merge.mixture.runtime.call.tokens import Tokens


def decided_outside(
    group: Modules, passed: Pass, seen: Tokens | None, x: Tensor, start: int, stop: int
) -> Tensor:
    """Weights of members start..stop, shape (T', M, E), T' dividing the number of tokens.

    Args:
        group: The modules.
        passed: The pass.
        seen: The tokens of their input, if the gate needs them and the pass knows.
        x: The input.
        start: First member.
        stop: After the last.

    Raises:
        MethodError: If nobody can tell which weights belong to which part of the input.
    """
    before = passed.gate.spec.decides_before
    weights = passed.weights if before else passed.gate.weights
    if weights is None:
        raise MethodError(
            f"{group.names[start]}: called outside of a call of the model, which decides "
            "its weights before it runs",
            "call the model",
        )
    weights = weights.to(group.down.device)  # spread over devices, each module has its own
    if len(weights) != 1:
        if passed.routed is not None and passed.routed.total % len(weights) == 0:
            weights = passed.routed.of_rows(weights)
        elif before:
            weights = _of_tokens(group.names[start], passed, seen, x, weights)
        elif not _holds_rows(passed, x, len(weights)) or group.is_routed:
            raise MethodError(
                f"{group.names[start]}: an input of shape {tuple(x.shape)}: nobody can tell how it "
                f"holds the rows of {len(weights)} requests",
                "one request for the whole batch, or experts without this module",
            )
    columns = [group.taken_by(m) for m in range(start, stop)]
    parts = [weights.index_select(1, each) for each in columns]
    return torch.stack(parts, dim=1) if len(parts) > 1 else parts[0][:, None]


def _of_tokens(name: str, passed: Pass, seen: Tokens | None, x: Tensor, weights: Tensor) -> Tensor:
    """The weights of an input's tokens, of those that a first pass decided for."""
    current = None if passed.stage is None else passed.stage.current
    of_each = () if seen is None else (seen.rows * (seen.length or 1), seen.rows)
    if len(weights) in of_each:  # the latter: lagged or frozen
        return weights
    head = None if current is None else current.head_sees(x)
    if current is not None and head is not None:
        rows = weights.view(current.rows, -1, weights.shape[1])
        if rows.shape[1] == current.length:
            return rows[:, head[1].to(rows.device)].flatten(0, 1)
    raise MethodError(
        f"{name}: its input {tuple(x.shape)} does not hold the tokens of the call, of which the "
        f"{passed.gate.spec.preset} gate has decided {len(weights)}",
        "leave the module out, or use a gate that looks at each module's own input",
    )


def _holds_rows(passed: Pass, x: Tensor, count: int) -> bool:
    """Whether an input holds the batch's rows one after another, each its request's.

    Windows and patches of one row stand side by side, and so do the beams of one row.
    """
    if passed.stage is None:
        return x.shape[0] % count == 0
    tokens = passed.stage.current
    if tokens is None or tokens.rows % count or x.shape[0] % tokens.rows:
        return False
    turned = (tokens.length, tokens.rows)  # (tokens, rows, width), as some models have it
    return tokens.length == tokens.rows or tuple(x.shape[:2]) != turned
