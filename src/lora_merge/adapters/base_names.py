"""From an adapter's names to a base checkpoint's: which prefix to take away or to add."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_merge.adapters.adapter import Adapter
from lora_merge.adapters.aligned_module import AlignedModule
from lora_merge.adapters.base_weights import lies_transposed
from lora_merge.adapters.forms import ModuleSpec
from lora_merge.adapters.identity.expert_names import expert_place
from lora_merge.adapters.module_names import unwrapped
from lora_merge.errors import AdapterError
from lora_merge.files.checkpoint import Checkpoint


@dataclass(frozen=True)
class Naming:
    """Adapter name → base name: one prefix taken away, another put before."""

    strip: str = ""
    add: str = ""

    def base_name(self, name: str) -> str:
        """What the base calls it; names without the prefix stay."""
        if not name.startswith(self.strip):
            return name
        return self.add + name.removeprefix(self.strip)


def find_naming(adapter: Adapter, modules: Sequence[AlignedModule], base: Checkpoint) -> Naming:
    """The prefix change under which every module has a tensor; none, if that will do.

    A checkpoint saved from a bare model lacks the prefix that the module has inside a task model
    ("h.0" for "transformer.h.0"), and the other way round.

    Raises:
        AdapterError: If no prefix finds every module.
    """
    names = [unwrapped(m.first.tensor) for m in modules]

    def missing(naming: Naming) -> list[str]:
        return [
            name
            for name in names
            if name != "lm_head.weight" and naming.base_name(name) not in base.tensors
        ]

    heads, ours = _prefixes(base.tensors), _prefixes(unwrapped(m.name) for m in modules)
    candidates = [Naming(strip, add) for strip in ours for add in heads]
    candidates.sort(key=lambda n: (len(n.strip) + len(n.add), n.strip, n.add))  # none at all first
    best = min(candidates, key=lambda naming: len(missing(naming)))
    lost = missing(best)
    if lost:
        _refuse_attention(adapter, lost[0], best.base_name(lost[0]), base)
        _refuse_other_experts(adapter, lost[0], best.base_name(lost[0]), base)
        raise AdapterError(
            f"{adapter.name}: {len(lost)} of {len(names)} modules have no tensor in "
            f"{base.folder} ({lost[0]})",
            "is this the base model the adapter was trained on?",
        )
    return best


def _refuse_attention(adapter: Adapter, module: str, stem: str, base: Checkpoint) -> None:
    """Name the reason at torch's attention: PEFT 0.21 adds the delta of `out_proj` twice."""
    if f"{stem.removesuffix('weight')}in_proj_weight" in base.tensors:
        raise AdapterError(
            f"{adapter.name}: {module.removesuffix('.weight')} is an nn.MultiheadAttention; how "
            "often the delta of its out_proj counts depends on the version of PEFT (0.21: twice)",
            "merge it by the PEFT that trained it: merge_and_unload(), then save the model",
        )


def _refuse_other_experts(adapter: Adapter, module: str, stem: str, base: Checkpoint) -> None:
    """Name the reason where the base stores its experts apart and the adapter does not, or so."""
    stems = {stem.removesuffix(".weight"), stem.rpartition(".")[0]}
    apart = [n for n in base.tensors if n.startswith(tuple(f"{one}.0." for one in stems))]
    single = expert_place(stem.removesuffix(".weight"))
    together = [n for n in base.tensors if single and n.startswith(f"{single.stem}.")]
    found = [*apart, *together]
    if not found:
        return
    ours, theirs = ("one tensor for all", "apart") if apart else ("apart", "in one tensor")
    raise AdapterError(
        f"{adapter.name}: {module} was trained with its experts {ours}, {base.folder} stores them "
        f"{theirs} ({found[0]})",
        "load the base with transformers 5, save_pretrained(DIR, save_original_format="
        f"{'False' if apart else 'True'}), and fuse into that",
    )


def _prefixes(names: Iterable[str]) -> set[str]:
    """First one to three components of every name, with the dot, and none."""
    found = {""}
    for name in names:
        parts = name.split(".")
        found |= {".".join(parts[:n]) + "." for n in range(1, min(4, len(parts)))}
    return {prefix for prefix in found if not any(p.isdigit() for p in prefix.split("."))}


def weight_of(adapter: Adapter, spec: ModuleSpec, checkpoint: Checkpoint) -> Tensor | None:
    """A module's base weight as (d_out, d_in), float32; None where the checkpoint lacks it.

    Args:
        adapter: The adapter.
        spec: One of its modules; experts have no single weight and give None.
        checkpoint: The base model.

    Raises:
        AdapterError: If the shapes do not belong together.
    """
    name = checkpoint.find(unwrapped(spec.name)) if spec.form != "experts" else None
    if name is None:
        return None
    weight = checkpoint.read(name).to(torch.float32)
    if spec.form == "conv":
        weight = weight.flatten(1)
    elif spec.form == "embedding" or lies_transposed(checkpoint, spec.name, adapter.config):
        weight = weight.mT
    if tuple(weight.shape) != (spec.d_out, spec.d_in):
        raise AdapterError(
            f"{checkpoint.folder}: {name} is {list(weight.shape)}, the adapter's {spec.name} is "
            f"{[spec.d_out, spec.d_in]}",
            "name the adapter's own base model",
        )
    return weight
