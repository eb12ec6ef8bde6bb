"""Adapters of image and video models: one reader for kohya, LyCORIS, diffusers and ComfyUI names.

They share the forms (`forms.py`) and what alpha means; they differ in how a module is spelled,
which matters when a file is written. A flattened name cannot be taken apart without the model, and
need not be: it is the module's identity as it stands.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from lora_merge.adapters.config import AdapterConfig, parse_config
from lora_merge.adapters.dialects.dialect import Claims, Dialect, Header
from lora_merge.adapters.dialects.diffusion import forms
from lora_merge.adapters.dialects.diffusion.dense import dense
from lora_merge.adapters.dialects.diffusion.names import COMPONENTS, family_of, group_names
from lora_merge.adapters.dialects.full_rank.dora import dora
from lora_merge.adapters.dialects.full_rank.turned import ia3, oft
from lora_merge.adapters.dialects.grouping import Group
from lora_merge.adapters.forms import ExtraSpec, ModuleSpec
from lora_merge.errors import AdapterError
from lora_merge.files.documents import parse_json, validated

# The part that marks a form → its reader.
_FORMS: dict[str, Callable[..., ModuleSpec]] = {
    "lora_down": forms.lora,
    "lora_up": forms.lora,
    "hada_w1_a": forms.loha,
    "lokr_w1": forms.lokr,
    "lokr_w1_a": forms.lokr,
    "a1.weight": forms.glora,
    "oft_blocks": oft,
    "on_input": ia3,
}
# What DoRA's trained norms are called.
_NORMS = ("dora_scale", "magnitude", "magnitude_vector")
# Parts that change what the others mean.
_REFUSED = {
    "oft_diag": "an OFT of another program, whose blocks are not known here",
    "reshape_weight": "a control LoRA, for which ComfyUI pads the base weight to another shape",
}
# Whole parameters, or what is added to them: no low-rank delta, but tensors that can be averaged.
_EXTRAS = ("diff", "diff_b", "w_norm", "b_norm", "set_weight")
_FUSED = re.compile(r"(double_blocks_\d+_(img|txt)_attn_qkv|single_blocks_\d+_linear1)$")
_METADATA = "lora_adapter_metadata"


def _claim(header: Header) -> Claims:
    groups = group_names(header)
    scalings = _Scalings(header)
    modules: dict[str, ModuleSpec] = {}
    extras: dict[str, ExtraSpec] = {}
    ignored: dict[str, str] = {}
    for module, group in groups.items():
        _refuse(group)
        form = next((form for part, form in _FORMS.items() if part in group), None)
        for part in _EXTRAS:
            if part in group and not (part == "diff" and _is_dense(group)):
                name = f"{module}.{part}"
                extras[name] = ExtraSpec(name, group.keys[part], *header.entries[group.keys[part]])
        norms = next((part for part in _NORMS if part in group), None)
        if form is not None and norms is not None:
            # A form that is cut as it is read would be cut before it is rescaled.
            whole = replace(group, header=replace(header, rank=None))
            modules[module] = dora(group, form(whole, scalings.of(group)), norms)
        elif form is not None:
            modules[module] = form(group, scalings.of(group))
        elif _is_dense(group):
            modules[module] = dense(group)
        elif "alpha" in group and not any(part in group for part in _EXTRAS):
            group.refuse("alpha stands alone", "the file is incomplete; download it again")
        said = ("alpha", "on_input") if form is ia3 else ("alpha",)
        ignored |= {group.keys[part]: "" for part in said if part in group}
    if not modules:
        raise AdapterError(
            f"{header.adapter}: no module has low-rank factors",
            "it only holds whole tensors; leave it out",
        )
    notes = (*scalings.notes, *_fused_blocks(modules))
    return Claims(_config(header), modules, extras, ignored, notes)


def _fused_blocks(modules: Mapping[str, ModuleSpec]) -> list[str]:
    """Flux's fused projections, in which sd-scripts may keep a LoRA for each part (`split_qkv`).

    Their ranks then are thrice, or in single blocks four times, those of other modules; that B is
    zero off its blocks no header tells.
    """
    usual = Counter(spec.rank for spec in modules.values() if not _FUSED.search(spec.name))
    if not usual:
        return []
    rank = usual.most_common(1)[0][0]
    fused = [n for n, s in modules.items() if _FUSED.search(n) and s.rank in (3 * rank, 4 * rank)]
    if not fused:
        return []
    return [
        f"{len(fused)} fused projections ({fused[0]}) have {modules[fused[0]].rank} units where "
        f"others have {rank}: one LoRA for each of q, k and v, as it seems; a merge is exact, and "
        "cuts them as one matrix, so that rank is shared between them"
    ]


def _refuse(group: Group) -> None:
    for part, why in _REFUSED.items():
        if part in group:
            group.refuse(why, "leave this adapter out, or retrain it as a plain LoRA")
    if "lora_bias" in group:
        group.refuse("B has a bias", "load it in diffusers and save it as a PEFT LoRA")
    if _is_dense(group) and any(part in group for part in (*_FORMS, *_NORMS)):
        group.refuse("a dense difference of weights beside factors", "leave this adapter out")
    if "scalar" in group:
        group.refuse("a scalar that LyCORIS multiplies its factors with", "save it with LyCORIS")


def _is_dense(group: Group) -> bool:
    return "diff" in group and len(group.shape("diff")) > 1


class _Scalings:
    """What the header or the command line says of a module's scaling, beside alpha tensors."""

    def __init__(self, header: Header) -> None:
        self.notes: list[str] = []
        self._fallback = header.config
        self._configs = {
            component: parse_config({"peft_type": "LORA", **raw}, header.adapter)
            for component, raw in _metadata_configs(header).items()
        }
        trained = header.metadata.get("ss_network_alpha"), header.metadata.get("ss_network_dim")
        if None not in trained and trained[0] != trained[1] and not _has_alpha(header):
            self.notes.append(
                f"trained with alpha {trained[0]} at rank {trained[1]}, but the file holds no "
                "alpha: every reader scales it by 1, and so does this"
            )

    def of(self, group: Group) -> float | None:
        """None leaves it to the module's own alpha (1 without)."""
        component, _, rest = group.module.partition(".")
        config = self._configs.get(component)
        if config is None and not self._configs and "alpha" not in group:
            config, rest = self._fallback, group.module
        if config is None or "lora_down" not in group:
            return None
        return config.scaling_of(rest, group.shape("lora_down")[0])


def _has_alpha(header: Header) -> bool:
    return any(key.endswith(".alpha") for key in header.entries)


def _metadata_configs(header: Header) -> dict[str, dict[str, Any]]:
    """A LoraConfig per component, from the JSON that diffusers puts into the file's header.

    SimpleTuner writes the same fields as entries of the header itself.
    """
    stored: Mapping[str, Any] = header.metadata
    if _METADATA in header.metadata:
        where = f"{header.adapter}: {_METADATA} in its header"
        document = parse_json(header.metadata[_METADATA], where, error=AdapterError)
        stored = validated(dict[str, Any], document, where, "save it again", error=AdapterError)
    configs: dict[str, dict[str, Any]] = {}
    for name, value in stored.items():
        component, _, field = name.partition(".")
        if component in COMPONENTS and field:
            configs.setdefault(component, {})[field] = _plain(value)
    return configs


def _plain(value: Any) -> Any:
    """A value of the header's own entries, which are all text."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def _config(header: Header) -> AdapterConfig:
    base = header.metadata.get("ss_base_model_version") or header.metadata.get(
        "modelspec.architecture"
    )
    return AdapterConfig(base_model=base or None, r=None)


def _is(family: str, header: Header) -> bool:
    return family_of(header) == family


KOHYA = Dialect("kohya", "kohya or LyCORIS (flattened names)", partial(_is, "kohya"), _claim)
DIFFUSERS = Dialect("diffusers", "diffusers", partial(_is, "diffusers"), _claim)
COMFYUI = Dialect("comfyui", "ComfyUI (dotted names)", partial(_is, "comfyui"), _claim)
