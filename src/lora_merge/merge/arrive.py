"""Adapters that arrive one by one, kept in a fixed number of slots (K-Merge, arXiv 2510.13537)."""

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_merge.adapters.access.coerce import open_adapters
from lora_merge.adapters.adapter import Adapter
from lora_merge.adapters.alignment import align, read_stacks
from lora_merge.arguments import takes
from lora_merge.errors import LoraMergeError, OutputError
from lora_merge.files.atomic import atomic_directory
from lora_merge.files.documents import read_json, validated
from lora_merge.files.inputs import is_within, noting_inputs
from lora_merge.merge.api import merge
from lora_merge.merge.recipe.arguments import Arrive
from lora_merge.printing import Report, Summary

SLOTS = "slots.json"
_SLOT = re.compile(r"slot-[1-9]\d*")


class SlotsError(LoraMergeError):
    """A directory of slots that cannot be read, or cannot take an adapter."""


@dataclass(frozen=True)
class Member:
    """An adapter that went into a slot.

    Attributes:
        name: What it was called.
        sha256: Of its weights file; "" of one made in memory.
    """

    name: str
    sha256: str


@dataclass(frozen=True)
class Arrival:
    """What became of one adapter.

    Attributes:
        adapter: Its name.
        slot: Where it went.
        merged: Whether other adapters were there before.
        cosines: Slot → cosine of the whole deltas, before it went in.
        kept: Cosine of the slot as it is now with the adapter: 1 is all of it.
    """

    adapter: str
    slot: str
    merged: bool
    cosines: dict[str, float]
    kept: float


@dataclass(frozen=True, repr=False)
class ArrivalReport(Report):
    """What became of the slots.

    Attributes:
        folder: The directory.
        arrivals: One per adapter, in their order.
        slots: Slot → who is in it, the first to arrive first.
    """

    folder: str
    arrivals: tuple[Arrival, ...]
    slots: dict[str, tuple[Member, ...]]

    def summary(self) -> Summary:
        """Who is where."""
        facts = [(slot, " + ".join(m.name for m in ms)) for slot, ms in self.slots.items()]
        return Summary(f"Slots of {self.folder}", tuple(facts))

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        slots = {name: [vars(m) for m in members] for name, members in self.slots.items()}
        arrivals = [vars(arrival) for arrival in self.arrivals]
        return {"schema": 1, "folder": self.folder, "arrivals": arrivals, "slots": slots}

    def rows(self) -> list[dict[str, Any]]:
        """One mapping per arrival."""
        return [vars(arrival) for arrival in self.arrivals]


@takes(Arrive)
def arrive(given: Arrive) -> ArrivalReport:
    """Take adapters, one after the other, into at most so many slots.

    While a slot is free an adapter gets one of its own; then it goes into the slot most like it:
    the slot becomes (n slot + adapter) / (n + 1), n being who is there, cut to its rank again.
    The directory is replaced whole or stays as it was.

    Raises:
        SlotsError: If the directory holds no slots, or more already, or an adapter has
            tensors that a running mean would count wrongly.
        OutputError: If lora-merge did not write all of it, or an adapter lies in it.

    Examples:
        >>> import lora_merge
        >>> report = lora_merge.arrive("examples/adapters/*", "slots", slots=2)
        >>> [arrival.slot for arrival in report.arrivals[:2]]
        ['slot-1', 'slot-2']
    """
    folder, slots = Path(given.into), given.slots
    opened = open_adapters(given.adapters)
    _check(opened, folder, slots)
    there = folder.exists() and any(folder.iterdir())
    with atomic_directory(folder, force=there) as staging, noting_inputs():
        # Inside: what is read of the slots is no input that it must not replace.
        members = read_slots(folder) if there else {}
        if len(members) > slots:
            raise SlotsError(
                f"{folder} has {len(members)} slots already", f"give --slots {len(members)}"
            )
        now = {name: Adapter.from_pretrained(folder / name) for name in members}
        stored = dict(now)
        arrivals = []
        for adapter in opened:
            cosines = _cosines(adapter, now)
            slot = _slot_of(cosines, slots, given.threshold)
            before = members.get(slot, ())
            parts = [now[slot], adapter] if before else [adapter]
            shares = [len(before) / (len(before) + 1), 1 / (len(before) + 1)] if before else [1.0]
            now[slot] = merge(
                parts,
                method="svd",
                weights=shares,
                rank=_possible(given.rank, parts) if before else None,
                scale=1.0,
                jobs=given.jobs,
                device=given.device,
            )
            members[slot] = (
                *before,
                Member(adapter.name, adapter.source.digest if adapter.source else ""),
            )
            kept = _cosines(adapter, {slot: now[slot]})[slot]
            arrivals.append(Arrival(adapter.name, slot, bool(before), cosines, kept))
        for name, slot_adapter in now.items():
            if slot_adapter is stored.get(name):
                shutil.copytree(folder / name, staging / name)
            else:
                slot_adapter.save_pretrained(staging / name)
        report = ArrivalReport(str(folder), tuple(arrivals), members)
        text = json.dumps({"version": 1, "slots": report.to_dict()["slots"]}, indent=2) + "\n"
        (staging / SLOTS).write_text(text, encoding="utf-8")
    return report


@dataclass(frozen=True)
class _Slots:
    """The file that says who is where."""

    version: int
    slots: dict[str, tuple[Member, ...]]


def read_slots(folder: Path) -> dict[str, tuple[Member, ...]]:
    """Slot → who is in it.

    Raises:
        SlotsError: If the directory holds no slots.
    """
    remedy = "name a directory that lora-merge arrive made, or one that is not there"
    path = folder / SLOTS
    if not path.is_file():
        raise SlotsError(f"{folder} has no {SLOTS}: it is no directory of slots", remedy)
    data = read_json(path, str(folder), error=SlotsError)
    what = f"{path} does not list slots and who is in them"
    slots = validated(_Slots, data, what, remedy, error=SlotsError)
    odd = [slot for slot, members in slots.slots.items() if not (_SLOT.fullmatch(slot) and members)]
    if slots.version != 1 or odd:
        raise SlotsError(f"{path} is not understood{f' ({odd[0]})' if odd else ''}", remedy)
    return slots.slots


def _check(adapters: Sequence[Adapter], folder: Path, slots: int) -> None:
    """What can be refused before anything is read."""
    if not adapters:
        raise SlotsError("no adapter arrives", "name one at least")
    if slots < 1:
        raise SlotsError(f"{slots} slots hold nothing", "give --slots 1 at least")
    for adapter in adapters:
        if adapter.extras:
            name = next(iter(adapter.extras))
            raise SlotsError(
                f"{adapter.name} has tensors that are not low-rank factors ({name}, ...); a "
                "running mean would count them wrongly",
                "drop them first: lora-merge merge ADAPTER --extras drop -o OUT",
            )
        for path in adapter.files:
            if is_within(path, folder):
                raise OutputError(
                    f"{adapter.name} lies in {folder}, which is replaced", "move it out first"
                )


def _possible(rank: int | None, parts: Sequence[Adapter]) -> int | None:
    """The rank asked for, or all that there is."""
    if rank is None:
        return None
    names = {name for part in parts for name in part.modules}
    units = [sum(p.modules[n].rank for p in parts if n in p.modules) for n in names]
    return min(rank, max(units))


def _slot_of(cosines: dict[str, float], slots: int, threshold: float | None) -> str:
    """Where an adapter goes; of equals the first."""
    best = max(cosines, key=lambda slot: cosines[slot], default="")
    alike = best and threshold is not None and cosines[best] >= threshold
    if len(cosines) >= slots or alike:
        return best
    return f"slot-{len(cosines) + 1}"


def _cosines(adapter: Adapter, slots: dict[str, Adapter]) -> dict[str, float]:
    """Cosine of an adapter's whole delta with that of every slot; 0 with or of a zero delta."""
    if not slots:
        return {}
    alignment = align([*slots.values(), adapter], accept_base_models=False)
    count = len(slots) + 1
    total = torch.zeros(count, count, dtype=torch.float64)
    for module in alignment.modules:
        for stack in read_stacks(alignment, module):
            found = stack.adapter_products()
            total[: len(found), : len(found)] += found.cpu()
    sizes = total.diagonal().clamp_min(0).sqrt().tolist()
    products = total[-1, :-1].tolist()
    return {
        slot: product / (size * sizes[-1]) if size * sizes[-1] > 0 else 0.0
        for slot, product, size in zip(slots, products, sizes, strict=False)
    }
