"""PEFT LoRA, and AdaLoRA and SoRA, which are LoRA with a gate on every unit."""

from lora_merge.adapters.config import AdapterConfig
from lora_merge.adapters.dialects.dialect import Claims, Dialect, Header
from lora_merge.adapters.dialects.looks_like import refuse_unclaimed
from lora_merge.adapters.dialects.peft_experts import find_parameters, turn_experts
from lora_merge.adapters.dialects.peft_module import module_spec
from lora_merge.adapters.dialects.peft_names import sort_keys
from lora_merge.adapters.dialects.peft_targets import check_targets
from lora_merge.adapters.dialects.peft_variants import (
    NO_WEIGHTS,
    TAKE_THE_DIFFERENCE,
    refuse_variants,
)
from lora_merge.adapters.dialects.peft_whole import check_whole, lost_biases, whole_parameters
from lora_merge.adapters.forms import ExtraSpec
from lora_merge.errors import AdapterError

_TYPES = ("LORA", "ADALORA", "SORA")
_MIXTURE = "LORA_MIXTURE"  # what our mixtures call themselves


def _recognises(header: Header) -> bool:
    """Factors named as PEFT names them, or a config of PEFT's."""
    said = header.config is not None and "peft_type" in header.config.raw
    return said or any(".lora_A" in key or ".lora_embedding_A" in key for key in header.entries)


def _claim(header: Header) -> Claims:
    name, entries = header.adapter, header.entries
    if header.config is not None:
        _refuse_other_types(header.config, name)
        refuse_variants(header.config, name)
    table = sort_keys(entries, name)
    if not table.factors:
        refuse_unclaimed(header, list(table.extras), whole=True)
    config = header.said()
    emptied = [m for m, keys in table.factors.items() if keys.gate and 0 in entries[keys.gate][1]]
    factors = {m: keys for m, keys in sorted(table.factors.items()) if m not in emptied}
    wrapped = find_parameters(factors, config, name)
    if header.config is not None and config.raw:
        check_targets(config, [m for m in factors if m not in wrapped], name)
    specs = [
        module_spec(m, keys, config, entries, name, wrapped.get(m)) for m, keys in factors.items()
    ]
    modules = {spec.name: spec for spec in turn_experts(specs, config, name, header.base)}
    ignored = dict(table.ignored)
    notes = []
    if emptied:
        notes.append(f"{len(emptied)} modules have no rank left ({emptied[0]}); they add nothing")
        ignored |= {key: "" for m in emptied for key in table.factors[m].all()}
    if not modules:
        raise AdapterError(
            f"{name}: no module has any rank left", "it changes nothing: leave it out"
        )
    if table.rewrapped:
        notes.append("keys are wrapped by PEFT more than once; unwrapped")
    is_whole = whole_parameters(config, modules)
    extras = {
        extra: ExtraSpec(extra, key, *entries[key])
        for extra, key in sorted(table.extras.items())
        if is_whole(extra, key)
    }
    for extra in extras.values():
        check_whole(extra, name)
    notes += lost_biases(config, extras, modules)
    return Claims(config, modules, extras, ignored, tuple(notes))


def _refuse_other_types(config: AdapterConfig, adapter: str) -> None:
    if config.peft_type == _MIXTURE:
        raise AdapterError(
            f"{adapter} is a mixture of adapters behind a gate, not one adapter",
            f"take its experts, {adapter}/experts/*, or make one adapter of them all: "
            f"lora-merge export {adapter} --to static; lora-merge info {adapter} shows it",
        )
    if config.peft_type not in _TYPES:
        raise AdapterError(
            f"{adapter}: peft_type is {config.raw.get('peft_type')!r}, not LORA",
            "leave this adapter out" if config.peft_type in NO_WEIGHTS else TAKE_THE_DIFFERENCE,
        )


PEFT_LORA = Dialect("peft-lora", "PEFT LoRA", _recognises, _claim)
