"""Mixtures over a MoE layer's router, which chooses experts by more than what a hook could see.

A router computes one score per expert by one product, and softmax, selection and weights from
these. The mixture adds to the product, where it happens.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lora_merge.errors import MethodError
from lora_merge.mixture.runtime.call.in_force import Switch
from lora_merge.mixture.runtime.call.passes import Pass


def is_router(module: nn.Module) -> bool:
    """Whether a module is a router with a weight of its own."""
    weight = module._parameters.get("weight")
    named = type(module).__name__.endswith("Router")
    return named and weight is not None and weight.dim() == 2 and weight.is_floating_point()


def shape_of(module: Any) -> tuple[int, int]:
    """(d_out, d_in) of a router's weight."""
    d_out, d_in = module.weight.shape
    return d_out, d_in


class _Scores(TorchFunctionMode):
    """Adds to the one product with a weight of this shape.

    Args:
        shape: Of the weight.
        add: Gives the scores with the mixture's, from inputs and scores.
    """

    def __init__(
        self, shape: torch.Size, add: Callable[[Tensor, Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.shape, self.add, self.found = shape, add, 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is functional.linear and len(args) > 1 and args[1].shape == self.shape:
            self.found += 1
            if self.add is not None:
                out = self.add(args[0], out)
        return out


class RouterRunner:
    """Runs a router with what a mixture has for it.

    Args:
        switch: Of the mixture.
    """

    def __init__(self, switch: Switch) -> None:
        self.switch, self.name = switch, ""

    def add(self, module: nn.Module, name: str) -> None:
        """Learn what the mixture calls the router."""
        self.name = name

    def run(
        self,
        passed: Pass,
        module: Any,
        own: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Outputs of the router."""
        place = passed.gate.place_of(self.name)
        if place is None:
            return own(*args, **kwargs)
        group, index = place

        def add(x: Tensor, y: Tensor) -> Tensor:
            return group.add(passed, index, x, y, in_place=False)

        scores = _Scores(module.weight.shape, add)
        with scores:
            out = own(*args, **kwargs)
        if scores.found != 1:
            raise MethodError(
                f"{self.name}: a {type(module).__name__} has computed {scores.found} products with "
                "its weight, where its experts' scores should be one",
                "leave the routers out of the adapters",
            )
        return out


def refusal_of(module: Any) -> str:
    """Why a router cannot be adapted, found out by running it on a token; empty if it can."""
    weight = module.weight
    if weight.device.type == "meta":
        return ""
    scores = _Scores(weight.shape)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=()), scores:
            type(module).forward(module, weight.new_zeros(1, weight.shape[1]))
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        return f"a {type(module).__name__}, which does not choose by hidden states alone ({error})"
    if scores.found != 1:
        return f"a {type(module).__name__}, whose scores are not one product with its weight"
    return ""


def reads_weight_of(module: nn.Module, part: nn.Module) -> bool:
    """Whether a router takes a part's weight without calling it, so that no hook would be heard.

    Args:
        module: What the part is in.
        part: A linear layer.
    """
    weight = getattr(part, "weight", None)
    if not type(module).__name__.endswith("Router") or not isinstance(part, nn.Linear):
        return False
    if weight is None or weight.device.type == "meta":
        return False
    called: list[bool] = []
    handle = part.register_forward_pre_hook(lambda *_: called.append(True))
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=()):
            type(module).forward(module, weight.new_zeros(1, weight.shape[1]))
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
        return False
    finally:
        handle.remove()
    return not called
