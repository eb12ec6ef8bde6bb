"""From the modules of one mixture to those of another with experts more or less."""

from collections.abc import Iterable

import torch
from torch import nn

from lora_merge.errors import MethodError
from lora_merge.mixture.mixture import Mixture
from lora_merge.mixture.runtime.fit_to_model import make_members
from lora_merge.mixture.runtime.wrapped.group import Group
from lora_merge.mixture.runtime.wrapped.member import Member, joined


def numbers_of(old: Mixture, new: Mixture) -> dict[int, int]:
    """Number of each expert that stays -> its new one."""
    places = {expert.name: number for number, expert in enumerate(new.experts)}
    return {n: places[e.name] for n, e in enumerate(old.experts) if e.name in places}


def changed_members(
    model: nn.Module,
    groups: Iterable[Group],
    old: Mixture,
    new: Mixture,
    dtype: torch.dtype | None,
) -> tuple[list[Member], dict[str, nn.Module]]:
    """The modules of another mixture of the same kind; only what is new is read.

    Args:
        model: The model.
        groups: The old mixture's.
        old: The old mixture.
        new: The new one: experts left out, others added.
        dtype: Of new experts; default: that of each target module.

    Returns:
        As `make_members`; the same bits as if the new mixture had been attached at once.

    Raises:
        AlignmentError: If the new experts do not fit the model.
    """
    numbers, count = numbers_of(old, new), new.num_experts
    gated = {was: now for was, now in numbers.items() if now < count}
    general = {was: now for was, now in numbers.items() if now >= count}
    fresh = set(range(len(new.experts))) - set(numbers.values())
    before = {member.name: member for group in groups for member in group.members()}
    read, targets = make_members(model, new, dtype, only=dict.fromkeys(before, fresh))
    added = {member.name: member for member in read}
    places = {name: number for number, name in enumerate(new.modules)}
    members = []
    for module in new.gated_modules:
        was, parts = before.get(module.name), []
        if was is not None:
            parts = [was.renumbered(gated, places[module.name])]
        if module.name in added:
            parts.append(added[module.name])
        if was is not None and was.general:
            parts.append(was.renumbered(general, places[module.name]))
        members.append(joined([part for part in parts if part.owner]))
    return members, targets


def check_names(old: Mixture, new: Mixture) -> None:
    """Refuse experts that would give the modules other names than they run under.

    Raises:
        MethodError: Naming one.
    """
    kept = {module for e in new.experts if e.name in old.names for module in e.adapter.modules}
    lost = sorted(kept - {m for e in old.experts for m in e.adapter.modules})
    if lost:
        raise MethodError(
            f"with the new experts, modules have other names than before ({lost[0]})",
            "detach the mixture and attach it again with all its experts",
        )
