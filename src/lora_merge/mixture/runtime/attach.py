"""Attach a mixture to any torch model, and take it off again without a trace.

Wrapped modules are not replaced: a forward hook adds the experts to what the module returns. So the
base may be anything that can be called (4-bit, GPTQ, offloaded), its state dict never changes, and
detaching leaves the model bit for bit as it was.
"""

import contextlib
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lora_merge.arguments import checked
from lora_merge.errors import LoraMergeWarning, MethodError
from lora_merge.kernels.gated_stack import dispatch
from lora_merge.mixture.gates.gate import GateSpec
from lora_merge.mixture.insight.usage import Usage
from lora_merge.mixture.mixture import Mixture
from lora_merge.mixture.runtime.call.asked import Request, Weights, gate_asked_for, names_in
from lora_merge.mixture.runtime.call.by_text import ByText
from lora_merge.mixture.runtime.call.entry import Entry, refuse_other_tokens
from lora_merge.mixture.runtime.call.generation import stop_telling
from lora_merge.mixture.runtime.call.hooks import (
    REGISTRY,
    Registry,
    forget_compiled,
    forgive,
    hide,
)
from lora_merge.mixture.runtime.call.in_force import InForce, Switch, changed, within
from lora_merge.mixture.runtime.call.passes import stop_carrying
from lora_merge.mixture.runtime.fit_to_model import make_members
from lora_merge.mixture.runtime.graph.step_graphs import (
    StepGraphs,
    record_steps,
    refuse_unrecordable,
    stop_recording,
)
from lora_merge.mixture.runtime.learned import gate_tensors, learned_parameters
from lora_merge.mixture.runtime.live.experts import CHANGES, LiveExperts
from lora_merge.mixture.runtime.live.shelf import Library, Shelf
from lora_merge.mixture.runtime.moe.enter import Entered, check_enterable
from lora_merge.mixture.runtime.overhead import Overhead, overhead
from lora_merge.mixture.runtime.precision import gate_dtype
from lora_merge.mixture.runtime.targets import without_wrappers
from lora_merge.mixture.runtime.two_pass import HiddenGate, TwoPass, refuse_two_sequences
from lora_merge.mixture.runtime.wrapped.base_matrix import join_groups

_SHORTCUT = "mixture"
Layout = Literal["stack", "rows", "border"]


@checked()
def load_mixture(
    model: nn.Module,
    source: Mixture | str | Path,
    *,
    name: str = "default",
    dtype: torch.dtype | None = None,
    layout: Layout | None = None,
    max_experts: int | None = None,
    library: Library | None = None,
    graph: bool = False,
) -> "AttachedMixture":
    """Attach a mixture to a model; afterwards the model runs and generates as always.

    Args:
        model: Any torch model that has the experts' target modules.
        source: A mixture, its directory, or a Hub id.
        name: To tell several mixtures of one model apart; the one attached last is active.
        dtype: Of the experts; default: that of the module each belongs to.
        layout: "stack" adds the experts to what each module returns. "rows" and "border" put the
            weights of plain `nn.Linear` modules and their experts into one matrix, for fewer
            products where no gradient is wanted: "rows" for few tokens (decoding), "border" for
            many as well (prefill). The results differ by rounding alone. Default: "stack", but
            "border" where LORA_MERGE_KERNELS is concat and "rows" where it is joined.
        max_experts: Most experts at once: what is added beyond puts the least recently named away.
        library: A directory of adapters, or references by name: experts that `requests` or
            `set_gate` name and that are not attached, are added from there.
        graph: Record a decoding step as a CUDA graph and replay it for every further token:
            `generate` then takes a static cache unless told otherwise, and the host only copies
            the token in and the logits out. What is no such step runs as ever. Where a host's
            launches are what a token costs; best with the layout "rows".

    Returns:
        The handle, also reachable as `model.mixture`.

    Raises:
        MethodError: If the model has not the modules, has a mixture of that name already, or has
            weights that cannot be moved (tied, quantised, offloaded); if the layout or
            LORA_MERGE_KERNELS is none of the names; if the gate takes no new experts and there
            is a limit or a library; or if there is to be a graph and the model is on no GPU, is
            offloaded or has an encoder, or the gate looks at the tokens before (X-LoRA, sequence).

    Examples:
        >>> import lora_merge
        >>> from transformers import AutoModelForCausalLM
        >>> model = AutoModelForCausalLM.from_pretrained("examples/base")
        >>> handle = lora_merge.load_mixture(model, lora_merge.Mixture("examples/adapters/*"))
        >>> handle.detach()  # the model as it was
    """
    forced = dispatch.forced()  # a name that is none is told now, whatever will run
    if layout is not None and layout not in get_args(Layout):
        raise MethodError(f"layout is {layout!r}", f"one of {', '.join(get_args(Layout))}")
    mixture = source if isinstance(source, Mixture) else Mixture.from_pretrained(source)
    wanted: dict[str, Layout] = {"concat": "border", "joined": "rows"}
    chosen = layout or wanted.get(forced, "stack")
    shelf = Shelf(max_experts, library)
    return AttachedMixture(
        model, mixture, name=name, dtype=dtype, layout=chosen, shelf=shelf, graph=graph
    )


class AttachedMixture(LiveExperts):
    """A mixture at work in a model.

    Args:
        model: The model.
        mixture: The mixture.
        name: Its name among the model's mixtures.
        dtype: Of the experts.
        layout: "stack", "rows" or "border".
        shelf: Limits, and where more experts are.
        graph: Whether decoding steps are recorded.

    Attributes:
        mixture: What is attached; `current()` has what training made of it.
        groups: The wrapped modules.
        classifier: X-LoRA's classifier, or None.
        two_pass: Drives the first pass of X-LoRA, or None.
        graphs: What records decoding steps, or None.
    """

    graphs: StepGraphs | None = None

    def __init__(
        self,
        model: nn.Module,
        mixture: Mixture,
        *,
        name: str = "default",
        dtype: torch.dtype | None = None,
        layout: Layout = "stack",
        shelf: Shelf | None = None,
        graph: bool = False,
    ) -> None:
        super().__init__()
        self.name, self._dtype, self._shelf = name, dtype, shelf or Shelf()
        self._shelf.check(mixture)
        model = without_wrappers(model)
        others = getattr(model, REGISTRY, {})
        if not re.fullmatch(r"[\w-]+", name):
            raise MethodError(f"a mixture cannot be called {name!r}", "letters, digits, - and _")
        self._key = f"mixture_{name}"  # apart from ModuleDict's own attributes
        if self._key in others:
            raise MethodError(
                f"the model has a mixture called {name!r}", "detach it, or give another name"
            )
        spec = mixture.spec
        if spec.decides_before:
            refuse_two_sequences(model, spec.preset)
        members, targets = make_members(model, mixture, dtype)
        if spec.decides_before:
            refuse_other_tokens(model, targets)
        check_enterable(spec, targets)
        if graph:
            refuse_unrecordable(model, spec)
        self.switch = Switch(InForce(spec))
        self.classifier: HiddenGate | None = None
        self.two_pass: TwoPass | None = None
        if spec.signal == "hidden":
            device = members[0].down.device
            kind = gate_dtype(members[0].down.dtype)
            gate = HiddenGate(spec, mixture.gate, len(mixture.modules), kind).to(device)
            self.classifier, self.two_pass = gate, TwoPass(gate)
        self.first = ByText() if spec.signal == "text" else self.two_pass
        self._entries: list[Entry] = []
        self._entered: list[Entered] = []
        self._watched: Usage | None = None
        self._warned = False
        self._model = (model,)  # in a tuple: a plain reference, not a submodule
        self.train(model.training)
        groups = self._groups_of(mixture, members)
        self.mixture, self.groups = mixture, nn.ModuleList(groups)
        self._joined = []
        if layout != "stack":
            border = layout == "border"
            self._joined = join_groups(model, self.parts, targets, border=border)
        self.bank = self._banked(mixture, groups)
        self._hook(model, self.bank, targets)
        self._register(model)
        self.set_gate()
        self.graphs = record_steps(model, self._switches) if graph else None

    @property
    def matrices(self) -> list[Tensor]:
        """What holds base weights together with experts, in the layouts "rows" and "border"."""
        return [joined.joined.matrix for joined in self._joined]

    # -- life ------------------------------------------------------------------------------------

    def _apply(self, fn: Any, recurse: bool = True) -> "AttachedMixture":
        """Join again what `.to` and the like moved apart; the model's own modules come before."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.bank.forget()
        for joined in self._joined:
            joined.join()
        if self.graphs is not None:
            self.graphs.forget()
        return self

    def train(self, mode: bool = True) -> "AttachedMixture":
        """Follow the model; what training changes, no copy shows."""
        super().train(mode)
        if "bank" in self.__dict__:
            self.bank.forget()
        return self

    def _register(self, model: nn.Module) -> None:
        """Become a submodule, so that `.to` moves the experts; the state dict does not show it."""
        registry = getattr(model, REGISTRY, None)
        if registry is None:
            registry = Registry()
            model.add_module(REGISTRY, registry)
            registry.hooks = (  # type: ignore[assignment]
                model.register_state_dict_post_hook(hide),
                model.register_load_state_dict_post_hook(forgive),
            )
        registry[self._key] = self
        forget_compiled()
        self.activate()

    def activate(self) -> None:
        """Be the model's one active mixture, in all threads that are in no block."""
        model = self._model[0]
        for switch in self._switches():
            switch.set(replace(switch.default, enabled=switch is self.switch))
        object.__setattr__(model, _SHORTCUT, self)

    def _switches(self) -> list[Switch]:
        """Those of all mixtures of the model."""
        registry = getattr(self._model[0], REGISTRY, {})
        return [each.switch for each in registry.values()]

    @contextlib.contextmanager
    def selected(self) -> Iterator[None]:
        """Be the model's one active mixture inside the block, in this thread alone."""
        own = {s: changed(s, enabled=s is self.switch) for s in self._switches()}
        with within(own):
            yield

    def detach(self) -> None:
        """Take the mixture off; the model is what it was before, bit for bit."""
        model = self._model[0]
        for entry in self._entries:
            entry.remove()
        self._entries.clear()
        for entered in self._entered:
            entered.leave()
        self._entered.clear()
        self.switch.hooks.clear()
        forget_compiled()
        stop_carrying(model, self.switch)
        for joined in self._joined:
            joined.part()
        self._joined = []
        registry = getattr(model, REGISTRY, None)
        if registry is None or registry._modules.get(self._key) is not self:
            return
        del registry[self._key]
        if all(each.graphs is None for each in registry.values()):
            stop_recording(model)
        if len(registry):
            if model.__dict__.get(_SHORTCUT) is self:
                next(reversed(registry.values())).activate()
            return
        for hook in registry.hooks:
            hook.remove()
        stop_telling(model)
        delattr(model, REGISTRY)
        model.__dict__.pop(_SHORTCUT, None)

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """The base model, exactly, inside the block, in this thread alone."""
        with self.using(enabled=False):
            yield

    @contextlib.contextmanager
    def first_pass(self) -> Iterator[None]:
        """What a two-pass gate looks at, inside the block: the base, or the even mixture."""
        if self.two_pass is None or self.mixture.spec.bypass:
            with self.disabled():
                yield
            return
        spec, weights = GateSpec("constant", "constant", "model"), self.two_pass.even_weights()
        even = InForce(spec, weights, bank=self.bank)
        with within({self.switch: even}):
            yield

    @contextlib.contextmanager
    def using(self, **changes: Any) -> Iterator[None]:
        """Attributes of the gate in force (`InForce`) changed inside the block, in this thread."""
        with within({self.switch: changed(self.switch, **changes)}):
            yield

    # -- gate ------------------------------------------------------------------------------------

    def set_gate(
        self,
        *,
        weights: Weights | None = None,
        requests: Sequence[Request] | None = None,
        **settings: Any,
    ) -> None:
        """Change the gate in force; without arguments go back to the mixture's own.

        Args:
            weights: Fixed weights, by expert's name (others 0) or one per expert.
            requests: One expert's name, weights by name, or None (base model) for each batch row.
            settings: `top_k`, `temperature`, `scale`, ... of the mixture's own gate; for X-LoRA
                also `freeze_after` and `lagged`.
        """
        with CHANGES:
            gate = self._gate(weights, requests, settings)
            self.switch.set(replace(gate, enabled=self.switch.default.enabled))

    def _gate(
        self, weights: Weights | None, requests: Sequence[Request] | None, settings: dict[str, Any]
    ) -> InForce:
        """What a caller wants to be in force, after its experts have been added if need be."""
        bank = self._bank_with(list(dict.fromkeys(names_in(weights, requests))))
        return gate_asked_for(
            self.mixture, bank, self.device, weights=weights, requests=requests, settings=settings
        )

    @contextlib.contextmanager
    def requests(self, *experts: Request) -> Iterator[None]:
        """One expert per batch row inside the block (S-LoRA's batch), in this thread alone.

        Experts that are not attached are added from the library; the block keeps what it has.
        """
        now, gate = self.switch.now(), self._gate(None, experts, {})
        if now.observe is not None and now.bank is not gate.bank:
            raise MethodError(
                "experts have come or gone since the watch began, which counts by their places",
                "begin another `with m.watch():`",
            )
        if now.observe is None:
            gate = gate.alone()
        with within({self.switch: replace(gate, enabled=now.enabled, observe=now.observe)}):
            yield

    def train_gate_only(self) -> list[nn.Parameter]:
        """Let gradients into the gate and nowhere else; returns its parameters."""
        self._model[0].requires_grad_(False)
        self._warned = True
        learned = learned_parameters(self.mixture.spec, self.parts, self.classifier)
        for parameter in learned:
            parameter.requires_grad_(True)
        return learned

    def warn_if_untrained(self) -> None:
        """Say once that a gate decides by what it was drawn with, or by nothing."""
        spec, now = self.mixture.spec, self.switch.now()
        if spec.trained or self._warned or now.is_idle or now.spec.signal != spec.signal:
            return
        self._warned = True
        text = (
            f"mixture {self.name}: its {spec.preset} gate has not been trained; "
            "lora-merge train, or lora_merge.train, does"
        )
        warnings.warn(text, LoraMergeWarning, stacklevel=4)

    def gate_tensors(self) -> dict[str, Tensor]:
        """The gate as it is now, by the names of the directory, float32 on the CPU."""
        return gate_tensors(self.mixture, self.parts, self.classifier)

    @contextlib.contextmanager
    def watch(self) -> Iterator[Usage]:
        """Count which expert speaks where, inside the block: `with model.mixture.watch() as u`."""
        bank = self.switch.now().bank or self.bank
        self._watched = record = Usage(bank.names)
        with self.using(observe=record.observe):
            yield record

    def usage(self) -> Usage:
        """What the last `watch` saw.

        Raises:
            MethodError: If nothing has been watched.
        """
        if self._watched is None:
            raise MethodError(
                "nothing was watched", "run the model inside `with model.mixture.watch():`"
            )
        return self._watched

    def overhead(self) -> Overhead:
        """What the mixture costs beside the base model."""
        return overhead(self.mixture, itemsize=self.parts[0].down.element_size())
