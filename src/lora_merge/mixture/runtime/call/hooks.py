"""What attaching leaves in a model: hooks on modules and on the state dict."""

import sys
from collections.abc import Callable, Iterable, Iterator
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn

from lora_merge.errors import MethodError

REGISTRY = "lora_mixtures"  # the submodule that holds a model's mixtures
_LOCK = RLock()  # one for all: hooks come and go seldom, and a lock cannot be copied


def body_of(model: nn.Module) -> nn.Module:
    """The transformer without its head: where tokens begin."""
    unwrap = getattr(model, "get_base_model", None)  # PEFT's; its own body is no transformer
    if callable(unwrap):
        model = unwrap()
    body = getattr(model, "base_model", model)
    return body if isinstance(body, nn.Module) else model


def forget_compiled() -> None:
    """Have compiled models compile again: what they compiled does not look for new hooks."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


class Registry(nn.ModuleDict):
    """Where a model keeps its mixtures: moved and trained with it, and invisible to offloading.

    accelerate walks over a model's named children to move their weights away until they are called;
    experts are never called, and stay.
    """

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Nobody."""
        return iter(())

    def children(self) -> Iterator[nn.Module]:
        """The mixtures, for `.to`, `.train` and the like."""
        return iter(m for m in self._modules.values() if m is not None)


class ModuleHook:
    """Forward hook that adds the experts of one module to what it returns.

    An object, not a closure, so that a copy of a model has hooks of its own.

    Args:
        enter: Gives the pass that the module is called in; None if it is to be its base.
        name: What the experts call the module.
        in_place: Whether its output is nobody else's.
    """

    def __init__(self, enter: Callable[[], Any], name: str, *, in_place: bool) -> None:
        self.enter, self.name, self.in_place = enter, name, in_place

    def __call__(self, module: nn.Module, args: tuple[Any, ...], *rest: Any) -> Any:
        """Add the experts, if this pass wants them; `rest` is the keywords and the output."""
        if len(rest) == 1:  # torch calls so while another thread is registering it: not this pass
            return None
        kwargs, out = rest
        passed = self.enter()
        place = None if passed is None else passed.gate.place_of(self.name)
        if place is None:
            return None
        x = args[0] if args else next(iter(kwargs.values()))
        # Another hook may have kept the base's output: then it is not ours to write into.
        mine = self.in_place and len(module._forward_hooks) == 1
        in_place = mine and not torch.is_grad_enabled()
        group, index = place
        return group.add(passed, index, x, out, in_place=in_place)


class ModuleHooks:
    """The hooks that run the experts, all in the model or all out of it.

    A module without hooks is called without a detour: what is attached and does nothing, costs
    nothing.
    """

    def __init__(self) -> None:
        self.inside = True
        self._hooks: list[tuple[nn.Module, int, Any]] = []
        self._places: list[tuple[nn.Module, str, nn.Module]] = []

    def add(self, module: nn.Module, hook: Any) -> None:
        """Register one more hook, unless the module has it."""
        with _LOCK:
            if any(module is known and hook.name == one.name for known, _, one in self._hooks):
                return
            handle = module.register_forward_hook(hook, with_kwargs=True)
            self._hooks.append((module, handle.id, hook))
            if not self.inside:
                self._take_out()

    def note_places(self, model: nn.Module, wrapped: Iterable[nn.Module]) -> None:
        """Remember where in the model the wrapped modules stand."""
        wanted = {id(module) for module in wrapped} | {id(module) for _, _, module in self._places}
        self._places = [
            (parent, leaf, child)
            for parent in model.modules()
            for leaf, child in parent._modules.items()
            if child is not None and id(child) in wanted
        ]

    def check_places(self) -> None:
        """Refuse a model in which others stand there now, which would run without experts.

        Raises:
            MethodError: Naming the first.
        """
        places = self._places
        for index, (parent, leaf, module) in enumerate(places):
            now = parent._modules.get(leaf)
            if now is module:
                continue
            if now is None or not any(inner is module for inner in now.modules()):
                raise MethodError(
                    f"{leaf} of a {type(parent).__name__} was replaced by a {type(now).__name__} "
                    "after the mixture was attached, and would run without its experts",
                    "detach the mixture and attach it again",
                )
            places[index] = (parent, leaf, now)  # somebody has wrapped it

    def put(self, inside: bool, keep: Callable[[], bool] = lambda: False) -> None:
        """Put the hooks into the model or take them out, unless somebody keeps them in."""
        if self.inside is inside:
            return
        with _LOCK:
            if inside:
                self._insert()
            elif not keep():
                self._take_out()

    def _insert(self) -> None:
        if self.inside:
            return
        for module, number, hook in self._hooks:
            hooks: Any = module._forward_hooks
            hooks[number] = hook
            for later in [n for n in hooks if n > number]:  # each in the place it registered for
                hooks.move_to_end(later)
        self.inside = True

    def _take_out(self) -> None:
        """The note that they want keywords stays: a call that has begun may still come to them."""
        for module, number, _ in self._hooks:
            module._forward_hooks.pop(number, None)
        self.inside = False

    def clear(self) -> None:
        """Take the hooks out for good."""
        with _LOCK:
            self._take_out()
            for module, number, _ in self._hooks:
                module._forward_hooks_with_kwargs.pop(number, None)
            self._hooks.clear()


def counted(switch: Any, change: int) -> None:
    """Count a pass that begins or ends; the hooks are in the model while there is one."""
    with _LOCK:
        switch.running += change
        if change > 0:
            switch.hooks.put(True)


def hide(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Keep the mixtures out of the base model's state dict; they save themselves.

    What is being trained of them stays: a trainer's checkpoint is nothing without it.
    """
    own, start = getattr(module, REGISTRY), f"{prefix}{REGISTRY}."
    trained = {name for name, p in own.named_parameters() if p.requires_grad}
    for key in [key for key in state if key.startswith(start)]:
        if key.removeprefix(start) in trained:
            state[key] = state[key].clone()  # files want no views of what is not in them
        else:
            del state[key]
    matrices = {m.data_ptr() for each in getattr(module, REGISTRY).values() for m in each.matrices}
    for key, value in state.items():
        if isinstance(value, Tensor) and value.untyped_storage().data_ptr() in matrices:
            state[key] = value.clone(memory_format=torch.contiguous_format)  # files want it so


def forgive(module: nn.Module, keys: Any) -> None:
    """The same for loading: the base's file has no mixture in it, and need not."""
    missing = keys.missing_keys
    missing[:] = [key for key in missing if f"{REGISTRY}." not in key]
