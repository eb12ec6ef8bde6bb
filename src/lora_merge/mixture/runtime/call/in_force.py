"""Which gate is in force: one for all threads, and another inside a block of one thread."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lora_merge.errors import MethodError
from lora_merge.kernels.gate_rule import Rule
from lora_merge.mixture.gates.gate import GateSpec
from lora_merge.mixture.runtime.call.bank import Bank
from lora_merge.mixture.runtime.call.hooks import ModuleHooks
from lora_merge.mixture.runtime.call.modules import Modules


@dataclass(frozen=True, eq=False)
class Decision:
    """What a gate has decided for modules that are alike (or one).

    Attributes:
        group: The modules.
        start: First of them.
        stop: After the last.
        weights: Shape (T', M, E); T' divides the number of tokens.
        scores: What the weights are made of, shape (T', M, n), or None.
        counts: Tokens that are no padding, bool, shape (T,); None if all, or nobody knows.
        by_rank: Whether weights and scores are those of single ranks.
        replay: Whether this decides again what was seen before, under gradient checkpointing.
        tokens: Which of the call's tokens these are, int64, shape (T',); None for all.
    """

    group: Modules
    start: int
    stop: int
    weights: Tensor
    scores: Tensor | None
    counts: Tensor | None
    by_rank: bool
    replay: bool
    tokens: Tensor | None = None


@dataclass(frozen=True, eq=False)
class InForce:
    """The gate of a call, and who looks at it.

    Attributes:
        spec: The gate.
        weights: Weights that the caller fixed, one row for all or one per request, (rows, columns).
        zero: Whether they are all zero: the base model.
        enabled: Whether the mixture runs at all.
        only: Expert that alone may act in each batch row, int64, shape (B,), or None.
        observe: Called with every decision of the modules' gates.
        observe_hidden: Called with scores (T, n), weights (T, C) and expert numbers of every module
            that a first pass decides for.
        freeze_after: Skip the first pass after this many decoded tokens and keep the last weights.
        lagged: While decoding, take the weights from the previous token's mixed hidden state.
        bank: The experts.
    """

    spec: GateSpec
    weights: Tensor | None = None
    zero: bool = False
    enabled: bool = True
    only: Tensor | None = None
    observe: Callable[[Decision], None] | None = None
    observe_hidden: Callable[[Tensor, Tensor, tuple[int, ...]], None] | None = None
    freeze_after: int | None = None
    lagged: bool = False
    bank: Bank | None = None
    _rules: dict[int, Rule] = field(default_factory=dict)
    _tags: list[tuple[Any, ...]] = field(default_factory=list)

    def rule(self, num_scores: int) -> Rule:
        """How so many scores become weights; made once, as every module of every token asks."""
        found = self._rules.get(num_scores)
        if found is None:
            found = self._rules[num_scores] = self.spec.rule(num_scores)
        return found

    def place_of(self, module: str) -> tuple[Modules, int] | None:
        """A wrapped module's group and its place there; None if no expert touches it."""
        return None if self.bank is None else self.bank.places.get(module)

    def alone(self) -> "InForce":
        """The same with those experts alone that have a weight, where it is worth it."""
        weights, bank = self.weights, self.bank
        if weights is None or bank is None or not bank.may_narrow(1):
            return self
        active = tuple(weights.any(0).nonzero().flatten().tolist())
        narrow = bank.alone(active)
        if narrow is None:
            return self
        return replace(self, weights=weights[:, list(active)], bank=narrow, _rules={}, _tags=[])

    def with_bank(self, bank: Bank, numbers: Mapping[int, int]) -> "InForce":
        """The same gate over other experts.

        Args:
            bank: Those.
            numbers: Column of each expert that stays -> its new one.
        """
        weights = self.weights
        if weights is not None:
            moved = weights.new_zeros(len(weights), len(bank.names))
            moved[:, list(numbers.values())] = weights[:, list(numbers)]
            weights = moved
        return replace(self, weights=weights, bank=bank, _rules={}, _tags=[])

    @property
    def tag(self) -> tuple[Any, ...]:
        """What decides about keys and values: names and weights, or the gate and its experts."""
        if not self._tags:
            self._tags.append(self._made_tag())
        return self._tags[0]

    def _made_tag(self) -> tuple[Any, ...]:
        experts = () if self.bank is None else self.bank.identities
        if self.weights is None:
            return "gate", self.spec, experts
        table = self.weights[:, : len(experts)].tolist()
        rows = [tuple((e, w) for e, w in zip(experts, r, strict=True) if w) for r in table]
        return "rows", tuple(rows[:1] if len(set(rows)) == 1 else rows)

    @property
    def is_idle(self) -> bool:
        """Whether the model is its base."""
        return not self.enabled or (self.zero and self.observe is None)

    @property
    def remembers(self) -> bool:
        """Whether what earlier tokens were decides about later ones."""
        return self.spec.memory > 0 or self.spec.sequence

    @property
    def is_per_row(self) -> bool:
        """Whether rows of the batch have weights of their own."""
        return self.weights is not None and len(self.weights) > 1

    @cached_property
    def decides_each_alone(self) -> bool:
        """Whether a module needs nothing but a token and these weights, and nobody looks on."""
        if self.observe is not None or self.only is not None:
            return False
        return not self.spec.is_local or (self.spec.has_rows and not self.remembers)

    @property
    def needs_tokens(self) -> bool:
        """Whether a module has to know which rows and tokens its input holds."""
        asked = self.only is not None or self.observe is not None
        return self.spec.decides_before or asked or self.remembers or self.is_per_row


# Identity of a switch -> what is in force in this thread's innermost block.
_BLOCKS: ContextVar[Mapping[int, InForce]] = ContextVar("lora_merge_blocks", default={})  # noqa: B039


class Switch:
    """Which gate of a mixture is in force, and whether its hooks are in the model.

    Args:
        default: For threads that are in no block.

    Attributes:
        default: The same.
        hooks: What runs the experts; out of the model while nobody needs them.
        running: Passes with experts that are under way, in all threads.
        traced: The pass that torch.compile is tracing; it knows no context variables.
    """

    def __init__(self, default: InForce) -> None:
        self.default = default
        self.hooks = ModuleHooks()
        self.running = 0
        self.traced: Any = None
        # What gradients were recorded under: the gate, and whether it was one throughout.
        self._differentiated: tuple[tuple[Any, ...], InForce, bool] | None = None
        self._block: InForce | None = None  # of the thread that entered last, for compiled models

    def now(self) -> InForce:
        """The gate in force here."""
        if torch.compiler.is_compiling():
            return self._block or self.default
        return _BLOCKS.get().get(id(self), self.default)

    def gate_of_call(self) -> tuple[InForce, bool]:
        """The gate of a call that begins here, and whether the call is a backward pass's replay.

        Raises:
            MethodError: If it is one, and nobody can tell of which gate.
        """
        gate = self.now()
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return gate, False
        key = gate.enabled, gate.spec, gate.weights, gate.only, gate.bank
        if not _in_backward():
            known = self._differentiated
            same = known is None or all(a is b for a, b in zip(known[0], key, strict=True))
            self._differentiated = (key, gate, same and (known is None or known[2]))
            return gate, False
        if self._differentiated is None or not self._differentiated[2]:
            raise MethodError(
                "a part of the model is computed again for its gradient, outside of any call, and "
                "the gate has changed in between: nobody can tell which one it had",
                "model.gradient_checkpointing_enable(), which remembers, or one gate throughout",
            )
        return self._differentiated[1], True

    def set(self, gate: InForce) -> None:
        """Change the gate of all threads that are in no block."""
        self.default = gate
        self.settle()

    def settle(self) -> None:
        """Have the hooks in the model if they are needed, and out of it if they are not."""
        self.hooks.put(not self.now().is_idle, keep=lambda: self.running > 0)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


@contextmanager
def kept(switches: Iterable[Switch]) -> Iterator[None]:
    """What is in force here stays so inside the block, whatever other threads set meanwhile."""
    now = {id(switch): switch.now() for switch in switches}
    token = _BLOCKS.set({**_BLOCKS.get(), **now})
    try:
        yield
    finally:
        _BLOCKS.reset(token)


@contextmanager
def within(gates: Mapping[Switch, InForce]) -> Iterator[None]:
    """Gates that are in force inside the block, in this thread alone."""
    before = {switch: switch._block for switch in gates}
    token = _BLOCKS.set({**_BLOCKS.get(), **{id(s): gate for s, gate in gates.items()}})
    for switch, gate in gates.items():
        switch._block = gate
        switch.settle()
    try:
        yield
    finally:
        _BLOCKS.reset(token)
        for switch, block in before.items():
            switch._block = block
            switch.settle()


def changed(switch: Switch, **changes: Any) -> InForce:
    """The gate in force here with some of its attributes changed."""
    return replace(switch.now(), **changes, _rules={}, _tags=[])
