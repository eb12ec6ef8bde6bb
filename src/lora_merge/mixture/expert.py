"""An expert of a mixture: an adapter with a name of its own, and its files."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_merge.adapters.access.adapter_like import AdaptersLike
from lora_merge.adapters.access.coerce import open_adapters
from lora_merge.adapters.adapter import Adapter
from lora_merge.adapters.aligned_module import AlignedModule
from lora_merge.adapters.alignment import Alignment, align
from lora_merge.adapters.identity.expert_layout import all_one_by_one, stacked_again
from lora_merge.adapters.identity.twins import one_spelling
from lora_merge.adapters.references import WEIGHTS_NAME, sha256
from lora_merge.adapters.writer import AdapterWriter, plan_output
from lora_merge.errors import MethodError


@dataclass(frozen=True, eq=False)
class Expert:
    """One adapter of a mixture.

    Attributes:
        name: What requests, weights and reports call it.
        adapter: The adapter; its tensors stay on disk until it is attached.
        general: It is no expert but general knowledge, subtracted from every expert (GenKnowSub).
        source: Where it came from.
        sha256: Hash of its weights, where known.
    """

    name: str
    adapter: Adapter
    general: bool = False
    source: str = ""
    sha256: str = ""

    @property
    def mark(self) -> str:
        """What tells it from another of its name, also in another process; empty in memory."""
        source = self.adapter.source
        if self.sha256 or source is None:
            return self.sha256
        status = source.weights.stat()
        return f"{status.st_size} bytes of {status.st_mtime_ns}"


def make_experts(
    refs: AdaptersLike,
    *,
    names: Sequence[str] | None = None,
    taken: Sequence[str] = (),
    general: bool = False,
) -> list[Expert]:
    """Open adapters and give each a name of its own.

    Args:
        refs: Adapters or references.
        names: One per reference; default: the last part of each, numbered where they clash.
        taken: Names that are in use.
        general: Whether they are general knowledge.
    """
    adapters = open_adapters(refs)
    if names is not None:
        apart = len({*names, *taken}) == len(names) + len(taken)
        if len(names) != len(adapters) or not apart or not all(map(str.strip, names)):
            raise MethodError(
                f"{len(adapters)} experts, names {list(names)}", "give each a name of its own"
            )
        chosen = list(names)
    else:
        chosen, used = [], set(taken)
        for adapter in adapters:
            name = slug(adapter.name)
            while name in used:
                stem, _, number = name.rpartition("-")
                name = f"{stem}-{int(number) + 1}" if stem and number.isdigit() else f"{name}-2"
            used.add(name)
            chosen.append(name)
    return [
        Expert(name, adapter, general, source=_public_source(adapter))
        for name, adapter in zip(chosen, adapters, strict=True)
    ]


def align_experts(experts: Sequence[Expert], *, accept_base_models: bool = False) -> Alignment:
    """Lay experts side by side as a gate weighs them.

    Stacks of a base's MoE experts become a module for each of these, as each sees other tokens.

    Raises:
        AlignmentError: If the adapters do not fit together; lists every mismatch.
    """
    adapters = [expert.adapter for expert in experts]
    if any(".experts." in name for adapter in adapters for name in adapter.modules):
        adapters = all_one_by_one(one_spelling(adapters))
    return align(adapters, accept_base_models=accept_base_models)


def _public_source(adapter: Adapter) -> str:
    """A Hub reference as it is; of a local path the last part, since the rest is nobody's."""
    if adapter.source is None:
        return ""
    local = adapter.source.revision is None
    return Path(adapter.source.ref).name if local else adapter.source.ref


def slug(reference: str) -> str:
    """A short name that is safe in a path and in a report."""
    last = reference.rstrip("/").removesuffix(".safetensors").rsplit("/", 1)[-1]
    return re.sub(r"[^\w.-]+", "-", last).strip("-.") or "expert"


def write_expert(expert: Expert, folder: Path) -> str:
    """Copy an expert as it is, or write it out if it has no safetensors file of its own."""
    source = expert.adapter.source
    if source is not None and source.config_text is not None and source.has_safetensors:
        source.write(folder)
    else:
        write_adapter(expert.adapter, folder)
    return sha256(folder / WEIGHTS_NAME)


def write_adapter(adapter: Adapter, folder: Path) -> None:
    """Write an adapter that exists in memory alone; its scaling is folded into B."""
    adapter = stacked_again(adapter)
    modules = [AlignedModule(name, {0: spec}) for name, spec in adapter.modules.items()]
    ranks = {name: spec.rank for name, spec in adapter.modules.items()}
    plan = plan_output([adapter], modules, ranks, dtype="F32", layout="per-module")
    with AdapterWriter(folder, plan) as writer:
        for name in adapter.modules:
            writer.add(name, adapter.stacks(name), balance=False)
