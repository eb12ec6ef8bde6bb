"""One call of a model: what all of its modules know of it.

A pass is made where a call enters the model, from its arguments, and ends where the call leaves. It
travels in a context variable, so threads never share one; what has to outlive it lies on the KV
cache (`kv_state`). Parts of a model with tokens of their own (an encoder and its decoder, a vision
tower, a body without its head) are stages of the pass.
"""

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_merge.kernels.gated_stack import dispatch
from lora_merge.mixture.runtime.call.hooks import counted
from lora_merge.mixture.runtime.call.in_force import InForce, Switch
from lora_merge.mixture.runtime.call.kv_state import Companion
from lora_merge.mixture.runtime.call.tokens import Tokens

_CHECKPOINT = "_gradient_checkpointing_func"  # where transformers keeps it in a layer


@dataclass(eq=False)
class Stage:
    """A part of the model that a pass is in.

    Attributes:
        module: The part.
        gate: In force when the call entered the model; experts that act alone come later.
        outer: The part around it.
        tokens: What it reads, or None if its arguments do not tell.
        after: What the last part inside it has read: what a head sees.
        companion: State beside its KV cache, if it has one and the gate needs it.
        past: Tokens that the KV cache held before.
        counted: Whether the companion has been told of the tokens.
        prompt: Tokens of the prompt, where `generate` is known to run.
    """

    module: nn.Module
    gate: InForce
    outer: "Stage | None" = None
    tokens: Tokens | None = None
    after: Tokens | None = None
    companion: Companion | None = None
    past: int = 0
    counted: bool = False
    prompt: int | None = None

    @property
    def current(self) -> Tokens | None:
        """The tokens that modules see now."""
        return self.after or self.tokens


@dataclass(eq=False)
class Waiting:
    """What modules that share an input have left to hand out."""

    x: Tensor
    compute: object
    parts: dict[int, Any]


@dataclass(frozen=True, eq=False)
class Routed:
    """What a router has sent to one expert of a MoE layer.

    Attributes:
        tokens: Which of the call's tokens, row by row, int64, shape (T',).
        total: How many there are in all.
    """

    tokens: Tensor
    total: int

    def of_rows(self, values: Tensor) -> Tensor:
        """What belongs to these tokens, of values for every token or every row (values, ...)."""
        each = self.total // len(values)
        return values[(self.tokens // each).to(values.device)]


@dataclass(eq=False)
class Pass:
    """One call of a model.

    Attributes:
        switch: Of the mixture it belongs to.
        gate: In force when it began.
        outer: The pass of another mixture around it.
        stage: Where it is; None for a module that is called by itself.
        weights: Weights that a first pass has decided, (T, columns), or one row for all.
        bypass: Whether this is a first pass without experts.
        replay: Whether gradient checkpointing computes again what was computed before.
        routed: Which tokens an expert of a MoE layer gets; None outside of those.
        waiting: Shared inputs, by the modules that share them.
        each_alone: Whether every token may be decided alone, by plain operations without gradients.
    """

    switch: Switch
    gate: InForce
    outer: "Pass | None" = None
    stage: Stage | None = None
    weights: Tensor | None = None
    bypass: bool = False
    replay: bool = False
    routed: Routed | None = None
    waiting: dict[object, Waiting] = field(default_factory=dict)
    each_alone: bool = False


_CURRENT: ContextVar[Pass | None] = ContextVar("lora_merge_pass", default=None)


def current(switch: Switch) -> Pass | None:
    """The pass that a mixture is in, if any."""
    if torch.compiler.is_compiling():
        traced: Pass | None = switch.traced
        return traced
    found = _CURRENT.get()
    while found is not None and found.switch is not switch:
        found = found.outer
    return found


def of_module(switch: Switch) -> Pass | None:
    """The pass that a wrapped module is called in; None if it is to be its base.

    A module that somebody calls by itself has a pass of its own, of which nothing is known.
    """
    found = current(switch)
    if found is None:
        gate, replay = switch.gate_of_call()
        return None if gate.is_idle else Pass(switch, gate, replay=replay)
    return None if found.bypass else found


def begin(switch: Switch, gate: InForce) -> Pass:
    """A call enters the model."""
    if torch.compiler.is_compiling():
        made = switch.traced = Pass(switch, gate)
        return made
    switch.hooks.check_places()
    alone = gate.decides_each_alone and not torch.is_grad_enabled()
    alone = alone and not torch._C._get_tracing_state() and dispatch.forced() != "reference"
    if alone and gate.bank is not None:
        gate.bank.settle()
    made = Pass(switch, gate, outer=_CURRENT.get(), each_alone=alone)
    counted(switch, 1)
    _CURRENT.set(made)
    return made


def end(passed: Pass) -> None:
    """The call leaves the model, one way or the other."""
    if torch.compiler.is_compiling():
        passed.switch.traced = None
        return
    counted(passed.switch, -1)
    _CURRENT.set(passed.outer)


class Carried:
    """A function of a checkpoint that takes its pass along to where it is computed again.

    Args:
        checkpoint: `torch.utils.checkpoint.checkpoint` with its settings, or what stands for it.
        switch: Of the mixture.
    """

    def __init__(self, checkpoint: Callable[..., Any], switch: Switch) -> None:
        self.checkpoint, self.switch = checkpoint, switch
        self.keywords = getattr(checkpoint, "keywords", {})

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Checkpoint `function`."""
        passed = current(self.switch)
        if passed is None or torch.compiler.is_compiling():
            return self.checkpoint(function, *args, **kwargs)
        kept = _as_it_is(passed)

        def run(*inputs: Any, **named: Any) -> Any:
            if _CURRENT.get() is passed:  # the first time
                return function(*inputs, **named)
            again = replace(_as_it_is(kept), outer=_CURRENT.get())
            counted(self.switch, 1)
            _CURRENT.set(again)
            try:
                return function(*inputs, **named)
            finally:
                end(again)

        return self.checkpoint(run, *args, **kwargs)


def _as_it_is(passed: Pass) -> Pass:
    """A pass to compute again from here: what it will have decided by then, it has not yet."""
    stage = passed.stage
    if stage is not None and stage.companion is not None:
        companion = replace(stage.companion, rows=dict(stage.companion.rows))
        stage = replace(stage, companion=companion)
    elif stage is not None:
        stage = replace(stage)
    return replace(passed, stage=stage, outer=None, replay=True, waiting={})


def is_checkpointing(model: nn.Module) -> bool:
    """Whether parts of a model are going to be computed again."""
    return model.training and any(
        module.training and getattr(module, "gradient_checkpointing", False)
        for module in model.modules()
    )


def carry_through(model: nn.Module, switch: Switch) -> None:
    """Have every checkpoint in a model take the pass along."""
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            function = module.__dict__.get(_CHECKPOINT)
            if function is not None and not _carries(function, switch):
                module.__dict__[_CHECKPOINT] = Carried(function, switch)


def stop_carrying(model: nn.Module, switch: Switch) -> None:
    """Give every checkpoint its function back."""
    for module in model.modules():
        function = module.__dict__.get(_CHECKPOINT)
        if isinstance(function, Carried) and function.switch is switch:
            module.__dict__[_CHECKPOINT] = function.checkpoint


def _carries(function: Any, switch: Switch) -> bool:
    while isinstance(function, Carried):
        if function.switch is switch:
            return True
        function = function.checkpoint
    return False
