"""The experts of an attached mixture, which may come and go.

Nothing that runs is written to. A change makes other groups of modules from views of the old ones,
and other threads see them with their next call: what has begun keeps the experts it began with.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from threading import RLock

import torch
from torch import Tensor, nn

from lora_merge.adapters.access.adapter_like import AdaptersLike
from lora_merge.errors import MethodError
from lora_merge.mixture.append import append_experts, without_expert
from lora_merge.mixture.gates.gate import GateSpec
from lora_merge.mixture.gates.named_weights import weight_row
from lora_merge.mixture.gates.text_index import TextIndex
from lora_merge.mixture.mixture import Mixture
from lora_merge.mixture.runtime.call.bank import Bank, groups_by_name
from lora_merge.mixture.runtime.call.by_text import vectors_of
from lora_merge.mixture.runtime.call.entry import Before, Entry, parts_of
from lora_merge.mixture.runtime.call.generation import tell_generation
from lora_merge.mixture.runtime.call.hooks import ModuleHook, body_of, forget_compiled
from lora_merge.mixture.runtime.call.in_force import Switch, changed, within
from lora_merge.mixture.runtime.call.passes import of_module
from lora_merge.mixture.runtime.fit_to_model import group_members
from lora_merge.mixture.runtime.live.changed import changed_members, check_names, numbers_of
from lora_merge.mixture.runtime.live.shelf import Shelf, refuse_closed
from lora_merge.mixture.runtime.moe.enter import Entered, can_enter, enter_module
from lora_merge.mixture.runtime.precision import gate_dtype
from lora_merge.mixture.runtime.wrapped.base_matrix import JoinedGroup
from lora_merge.mixture.runtime.wrapped.group import Group
from lora_merge.mixture.runtime.wrapped.member import Member

CHANGES = RLock()  # one change at a time; a lock of its own could not be copied with a model


class LiveExperts(nn.Module):
    """The experts of an attached mixture: what runs, and what comes and goes.

    Attributes:
        name: Of the mixture, among the model's.
        mixture: What is attached.
        switch: Its gate in force.
        groups: The wrapped modules.
        bank: The same by name, for gates in force.
        first: What decides before the modules run, or None.
    """

    name: str
    mixture: Mixture
    switch: Switch
    groups: nn.ModuleList
    bank: Bank
    first: Before | None
    index: TextIndex | None
    _model: tuple[nn.Module]
    _joined: list[JoinedGroup]
    _entries: list[Entry]
    _entered: list[Entered]
    _dtype: torch.dtype | None
    _shelf: Shelf

    @property
    def device(self) -> torch.device:
        """Where the first experts are."""
        return next(self.groups.parameters()).device

    @property
    def parts(self) -> list[Group]:
        """The groups of wrapped modules."""
        return [group for group in self.groups if isinstance(group, Group)]

    def _groups_of(self, mixture: Mixture, members: Sequence[Member]) -> list[Group]:
        """Modules that read one tensor together, ready to run."""
        return self._grouped(members, mixture.num_experts, len(mixture.experts), mixture.spec)

    def _grouped(
        self, members: Sequence[Member], count: int, total: int, spec: GateSpec
    ) -> list[Group]:
        """The same for so many gated experts, of so many in all."""
        return [
            Group(
                part,
                self.switch,
                num_experts=count,
                num_general=total - count,
                gate_dtype=gate_dtype(members[0].down.dtype) if spec.has_rows else None,
            ).train(self.training)
            for part in group_members(members)
        ]

    def _banked(self, mixture: Mixture, groups: Sequence[Group]) -> Bank:
        """A mixture's experts by name, and what chooses among them."""
        self.index = TextIndex(mixture.gate, self.device) if mixture.spec.signal == "text" else None
        tiled = mixture.spec.signal == "hidden" and mixture.spec.granularity == "module"
        narrow = None if tiled or self._joined else self._narrow
        marks = tuple(expert.mark for expert in mixture.experts if not expert.general)
        return Bank(tuple(mixture.names), groups_by_name(groups), self.index, narrow, marks)

    def _narrow(self, bank: Bank, active: tuple[int, ...]) -> list[Group] | None:
        """Groups of some experts alone; None while the experts are being trained."""
        parts = dict.fromkeys(group for group, _ in bank.places.values())
        groups = [group for group in parts if isinstance(group, Group)]
        if not active or any(p.requires_grad for group in groups for p in group.parameters()):
            return None
        general = range(len(bank.names), len(bank.names) + groups[0].num_general)
        numbers = {old: new for new, old in enumerate((*active, *general))}
        members = [m.renumbered(numbers, m.number) for group in groups for m in group.members()]
        acting = [member for member in members if member.experts]
        if not acting:
            return None
        return self._grouped(acting, len(active), len(numbers), self.mixture.spec)

    def _hook(self, model: nn.Module, bank: Bank, targets: Mapping[str, nn.Module]) -> None:
        """Have the model call these experts; who was hooked before stays so."""
        joined = {name for each in self._joined for name in each.group.names}
        for module_name in bank.places.keys() - joined:
            target, enter = targets[module_name], partial(of_module, self.switch)
            if can_enter(target):
                enter_module(self._entered, self.switch, target, module_name)
                continue
            hook = ModuleHook(enter, module_name, in_place=type(target) is nn.Linear)
            self.switch.hooks.add(target, hook)
        self.switch.hooks.note_places(model, targets.values())
        body, known = body_of(model), [entry.module for entry in self._entries]
        for part in parts_of(model, targets.values()):
            if any(part is module for module in known):
                continue
            first = self.first if part is body else None
            self._entries.append(Entry(self.switch, self.name, part, first=first))
        tell_generation(model)

    def add(
        self,
        adapters: AdaptersLike,
        *,
        names: Sequence[str] | None = None,
        accept_base_models: bool = False,
        texts: Sequence[Sequence[Tensor]] | None = None,
    ) -> list[str]:
        """Add experts while the model runs; calls and blocks that have begun go on without them.

        Args:
            adapters: What `open_adapters` takes.
            names: Their names.
            accept_base_models: Accept experts that name another base model.
            texts: For a gate by text, some texts of each expert, as token ids.

        Returns:
            Their names.

        Raises:
            MethodError: If the gate knows nothing of new experts, or there is no room for them.
            AlignmentError: If they do not fit the model, or the others.
        """
        with CHANGES:
            described = None if texts is None else self._describe(texts)
            return self._add(
                adapters, names, accept_base_models=accept_base_models, described=described
            )

    def remove(self, name: str) -> None:
        """Take an expert off while the model runs; calls and blocks that have begun keep it.

        Raises:
            MethodError: If there is no such expert, it is pinned, the gate in force names it, or
                the gate was made for it.
        """
        with CHANGES:
            less = without_expert(self.mixture, name)
            if name in self._shelf.pinned or name in self._in_force():
                why = "pinned" if name in self._shelf.pinned else "what set_gate has named"
                raise MethodError(f"{name} is {why}", "unpin it, or set another gate")
            self._change(less)
            self._shelf.used.pop(name, None)

    def pin(self, *names: str) -> None:
        """Keep experts attached, whatever is added."""
        weight_row(self.mixture.names, dict.fromkeys(names, 1.0))  # or they are refused by name
        self._shelf.pinned.update(names)

    def unpin(self, *names: str) -> None:
        """Let experts go again."""
        self._shelf.pinned.difference_update(names)

    def _add(
        self,
        adapters: AdaptersLike,
        names: Sequence[str] | None,
        *,
        accept_base_models: bool = False,
        described: Tensor | None = None,
        keep: Sequence[str] = (),
    ) -> list[str]:
        """Add experts, and put others away for them, but none of those to keep."""
        refuse_closed(self.mixture)
        old, spec = self.mixture.names, self.mixture.spec
        more = append_experts(
            self.mixture,
            adapters,
            names=names,
            accept_base_models=accept_base_models,
            descriptors=described,
        )
        wanted = more.num_experts - len(old) if spec.signal == "text" else 0
        given = 0 if described is None else len(described)
        if given != wanted:
            raise MethodError(
                f"new experts behind a {spec.preset} gate: it needs texts of {wanted}, "
                f"there are those of {given}",
                "give texts of each new expert if the gate is retrieve, and none if it is not",
            )
        new = [name for name in more.names if name not in old]
        for name in self._shelf.to_put_away(old, len(new), {*self._in_force(), *keep}):
            more = without_expert(more, name)
            self._shelf.used.pop(name, None)
        self._change(more)
        self._shelf.touch(new)
        return new

    def _describe(self, texts: Sequence[Sequence[Tensor]]) -> Tensor:
        """The mean vector of each expert's texts."""
        if not texts or not all(texts):
            raise MethodError("an expert without texts", "give at least one text of each")
        body = body_of(self._model[0])
        with within({self.switch: changed(self.switch, enabled=False)}):
            return torch.stack([vectors_of(body, few).mean(0) for few in texts])

    def _in_force(self) -> list[str]:
        """Experts that the gate of all threads names."""
        gate = self.switch.default
        if gate.weights is None or gate.bank is None:
            return []
        pairs = zip(gate.bank.names, gate.weights.any(0).tolist(), strict=True)
        return [name for name, named in pairs if named]

    def _change(self, mixture: Mixture) -> None:
        """Attach another mixture of the same kind in the place of this one."""
        if self._joined:
            raise MethodError(
                "in this layout the experts lie in one matrix with the base weights",
                'attach with layout="stack" to add and remove experts',
            )
        model, old = self._model[0], self.mixture
        check_names(old, mixture)
        members, targets = changed_members(model, self.parts, old, mixture, self._dtype)
        groups = self._groups_of(mixture, members)
        bank = self._banked(mixture, groups)
        self._hook(model, bank, targets)  # before anybody can ask for it
        self.mixture, self.groups, self.bank = mixture, nn.ModuleList(groups), bank
        forget_compiled()
        numbers = {o: n for o, n in numbers_of(old, mixture).items() if o < old.num_experts}
        self.switch.set(self.switch.default.with_bank(bank, numbers))

    def _bank_with(self, names: Sequence[str]) -> Bank:
        """Experts among which all of these are; what is missing is added from the library."""
        shelf, bank = self._shelf, self.bank
        if shelf.library is None or set(names) <= set(bank.names):
            shelf.touch(name for name in names if name in bank.names)
            return bank
        with CHANGES:
            missing = [name for name in names if name not in self.bank.names]
            places = [shelf.find(name, self.bank.names) for name in missing]
            self._add(places, missing, keep=names)
            shelf.touch(names)
            return self.bank
