"""Modules of which a forward hook sees too little: their forward asks the mixtures first.

A hook sees what comes out of a module. The stack of a MoE layer's experts and its router add and
choose inside, so they are run anew while a mixture acts, and by their own forward otherwise.
"""

from collections.abc import Callable
from typing import Any, Protocol

from torch import nn

from lora_merge.mixture.runtime.call.in_force import Switch
from lora_merge.mixture.runtime.call.passes import Pass, of_module

# Where a module's forward may be: accelerate moves it, when it takes the weights away.
_PLACES = ("_old_forward", "forward")


class Runner(Protocol):
    """What a mixture does in place of a module's forward."""

    switch: Switch

    def add(self, module: nn.Module, name: str) -> None:
        """Take one more module of the mixture, unless it is known."""

    def run(
        self,
        passed: Pass,
        module: nn.Module,
        own: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Outputs of the module with the mixture's experts; `own` is the module's forward."""


class Replaced:
    """A module's forward, with mixtures before it.

    An object, not a closure, so that a copy of a model has one of its own.

    Args:
        module: The module.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.runners: list[Runner] = []
        place = next((p for p in _PLACES if p in module.__dict__), "forward")
        self.before = module.__dict__.get(place)
        module.__dict__[place] = self

    def own(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward."""
        if self.before is not None:
            return self.before(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module in the pass of the mixture that acts, if one does."""
        for runner in self.runners:
            passed = of_module(runner.switch)
            if passed is not None:
                return runner.run(passed, self.module, self.own, args, kwargs)
        return self.own(*args, **kwargs)

    def remove(self, runner: Runner) -> None:
        """Take a mixture off; after the last the module is what it was."""
        if runner in self.runners:
            self.runners.remove(runner)
        if self.runners:
            return
        for place in _PLACES:
            if self.module.__dict__.get(place) is not self:
                continue
            if self.before is not None:
                self.module.__dict__[place] = self.before
            elif place == "forward":
                del self.module.__dict__[place]
            else:
                self.module.__dict__[place] = type(self.module).forward.__get__(self.module)


def replaced(module: nn.Module) -> Replaced:
    """A module's forward, replaced if it is not yet."""
    found = (module.__dict__.get(place) for place in _PLACES)
    return next((f for f in found if isinstance(f, Replaced)), None) or Replaced(module)
