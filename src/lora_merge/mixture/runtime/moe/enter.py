"""Put a mixture into the MoE layers of a model."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from lora_merge.errors import MethodError
from lora_merge.mixture.gates.gate import GateSpec
from lora_merge.mixture.runtime.call.in_force import Switch
from lora_merge.mixture.runtime.moe.experts import ExpertsRunner, is_stack
from lora_merge.mixture.runtime.moe.replaced import Replaced, Runner, replaced
from lora_merge.mixture.runtime.moe.router import RouterRunner, is_router


def can_enter(module: nn.Module) -> bool:
    """Whether a mixture acts inside a module, and not on what comes out of it."""
    return is_stack(module) or is_router(module)


def check_enterable(spec: GateSpec, targets: Mapping[str, nn.Module]) -> None:
    """Refuse gates that look at earlier tokens, of which an expert sees those that chose it.

    Raises:
        MethodError: Naming the first module.
    """
    if not (spec.is_local and (spec.memory or spec.sequence)):
        return
    for name, module in targets.items():
        if is_stack(module):
            raise MethodError(
                f"{name}: the {spec.preset} gate counts the tokens before, of which an expert of a "
                "MoE layer sees only those that were sent to it",
                "use a gate that looks at each token alone, or adapters without the MoE experts",
            )


@dataclass(frozen=True, eq=False)
class Entered:
    """A module that a mixture acts inside of.

    Attributes:
        forward: The module's forward, replaced.
        runner: What the mixture does there.
    """

    forward: Replaced
    runner: Runner

    def leave(self) -> None:
        """Give the module its own forward back."""
        self.forward.remove(self.runner)


def enter_module(entered: list[Entered], switch: Switch, module: nn.Module, name: str) -> None:
    """Run a mixture inside a stack of experts or a router; what runs there already, stays.

    Args:
        entered: The modules that the mixture has entered; gets the new one.
        switch: Of the mixture.
        module: The stack or router.
        name: What the mixture calls it, or one of its projections.
    """
    for known in entered:
        if known.forward.module is module:
            known.runner.add(module, name)
            return
    runner: Runner = ExpertsRunner(switch) if is_stack(module) else RouterRunner(switch)
    runner.add(module, name)
    forward = replaced(module)
    forward.runners.append(runner)
    entered.append(Entered(forward, runner))
