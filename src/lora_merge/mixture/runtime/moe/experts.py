"""Mixtures over the experts of a MoE layer: each projection of each expert is a module of its own.

transformers 5 holds the experts of a layer in one module of stacked parameters. What a mixture has
for expert 3's projection acts on the tokens that the router has sent to expert 3, behind a gate of
its own, exactly as if expert 3 were a module. The stack follows transformers' experts interface,
from which is known how it stores its weights and what it does between them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_merge.adapters.identity.expert_names import expert_place
from lora_merge.errors import MethodError
from lora_merge.mixture.runtime.call.in_force import Switch
from lora_merge.mixture.runtime.call.passes import Pass, Routed

_INTERFACE = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "_apply_gate")
# A projection that transformers 4 had as a module -> which half of `gate_up_proj` it is.
_DOWN = ("down_proj", "w2")
_HALVES = {"gate_proj": 0, "w1": 0, "up_proj": 1, "w3": 1}


@dataclass(frozen=True)
class Projection:
    """Rows of one expert's part of a stacked parameter.

    Attributes:
        parameter: The parameter.
        expert: Which expert.
        half: 0 or 1 for the upper or lower half of the rows, None for all.
    """

    parameter: str
    expert: int
    half: int | None = None


def is_stack(module: nn.Module) -> bool:
    """Whether a module is a stack of experts that follows transformers' experts interface."""
    return all(hasattr(module, name) for name in _INTERFACE) and _is_plain(module)


def _is_plain(module: nn.Module) -> bool:
    down = module._parameters.get("down_proj")
    return down is not None and down.dim() == 3 and down.is_floating_point()


def _inner(module: Any) -> str:
    return "gate_up_proj" if module.has_gate else "up_proj"


def projections(module: Any) -> Iterator[str]:
    """What a stack's projections may be called, below the stack's own name."""
    leaves = [*_DOWN, _inner(module)]
    if module.has_gate and module.is_concatenated:
        leaves += _HALVES
    for expert in range(len(module.down_proj)):
        yield from (f"{expert}.{leaf}" for leaf in leaves)


def projection_of(module: Any, name: str) -> Projection:
    """What a module of the mixture is in a stack.

    Args:
        module: The stack.
        name: The mixture's name for it, such as "model.layers.0.mlp.experts.3.down_proj".
    """
    place = expert_place(name)
    assert place is not None
    _, expert, leaf = place
    if leaf in _DOWN:
        return Projection("down_proj", expert)
    inner = _inner(module)
    return Projection(inner, expert, None if leaf == inner else _HALVES[leaf])


def shape_of(module: Any, projection: Projection) -> tuple[int, int]:
    """(d_out, d_in) of a projection."""
    _, first, second = module._parameters[projection.parameter].shape
    d_out, d_in = (second, first) if module.is_transposed else (first, second)
    return d_out // (1 if projection.half is None else 2), d_in


class ExpertsRunner:
    """Runs a stack with what a mixture has for its experts.

    Args:
        switch: Of the mixture.
    """

    def __init__(self, switch: Switch) -> None:
        self.switch = switch
        # Parameter and expert -> the mixture's modules there.
        self._inside: dict[tuple[str, int], list[tuple[int | None, str]]] = {}

    def add(self, module: nn.Module, name: str) -> None:
        """Take one more projection of an expert, unless it is known."""
        place = projection_of(module, name)
        inside = self._inside.setdefault((place.parameter, place.expert), [])
        if (place.half, name) not in inside:
            inside.append((place.half, name))

    def run(
        self,
        passed: Pass,
        module: Any,
        own: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Outputs of the stack: hidden states (T, d), their experts (T, k) and these's weights."""
        hidden, chosen, shares = (*args, *kwargs.values())[:3]
        if chosen.is_floating_point():
            raise MethodError(
                f"{type(module).__name__} takes the router's choice in another order than "
                "transformers' experts do",
                "leave its experts out of the adapters",
            )
        count, flat = chosen.shape[-1], chosen.reshape(-1)
        order = flat.argsort(stable=True)
        numbers, sizes = flat[order].unique_consecutive(return_counts=True)
        outs = []
        for number, pairs in zip(numbers.tolist(), order.split(sizes.tolist()), strict=True):
            tokens = pairs // count
            if number < len(module.down_proj):
                routed = replace(passed, routed=Routed(tokens, len(hidden)))
                outs.append(self._expert(routed, module, number, hidden[tokens]))
            else:  # of another device, under expert parallelism
                outs.append(hidden.new_zeros(len(tokens), hidden.shape[1]))
        by_pair = torch.cat(outs)[order.argsort()] * shares.reshape(-1, 1)
        mixed: Tensor = by_pair.view(len(hidden), count, -1).sum(dim=1).to(hidden.dtype)
        return mixed

    def _expert(self, passed: Pass, module: Any, number: int, x: Tensor) -> Tensor:
        """One expert's outputs for the tokens that were sent to it."""
        inner = self._project(
            passed, module, "gate_up_proj" if module.has_gate else "up_proj", number, x
        )
        state = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
        out = self._project(passed, module, "down_proj", number, state)
        return module.post_expert_norm(out) if getattr(module, "has_post_expert_norm", 0) else out

    def _project(self, passed: Pass, module: Any, name: str, number: int, x: Tensor) -> Tensor:
        """One projection, with the experts of the mixture."""
        weight = getattr(module, name)[number]
        bias = getattr(module, f"{name}_bias")[number] if module.has_bias else None
        y = nn.functional.linear(x, weight.mT if module.is_transposed else weight, bias)
        halves: list[Tensor] = []
        for half, inside in self._inside.get((name, number), ()):
            found = passed.gate.place_of(inside)
            if found is None:
                continue
            group, index = found
            if half is None:
                y = group.add(passed, index, x, y, in_place=False)
            else:
                halves = halves or list(y.chunk(2, dim=-1))
                halves[half] = group.add(passed, index, x, halves[half], in_place=False)
        return torch.cat(halves, dim=-1) if halves else y
