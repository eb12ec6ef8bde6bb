"""torchtune: its own module names, and rows of q and k in the order of its rotary embedding."""

import re
from collections.abc import Callable
from functools import partial

from torch import Tensor

from lora_merge.adapters.dialects.dialect import Claims, Dialect, Header
from lora_merge.adapters.dialects.full_rank.dora import dora
from lora_merge.adapters.dialects.grouping import Group
from lora_merge.adapters.dialects.spelling import canonical
from lora_merge.adapters.forms import ModuleSpec
from lora_merge.adapters.module_names import place_of
from lora_merge.adapters.units import Units
from lora_merge.errors import AdapterError

_FACTOR = re.compile(r"^(?P<module>.+)\.(?P<part>lora_a\.weight|lora_b\.weight|magnitude)$")
# torchtune's name of a module → that of transformers (torchtune's `tune_to_peft_adapter_weights`).
_NAMES = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}


def _recognises(header: Header) -> bool:
    return any(key.endswith(".lora_a.weight") for key in header.entries)


def _claim(header: Header) -> Claims:
    config = header.said()
    keys: dict[str, dict[str, str]] = {}
    for key in sorted(header.entries):
        match = _FACTOR.match(canonical(key))
        if match is not None:
            part = match["part"].removesuffix(".weight")
            keys.setdefault(match["module"], {})[part] = key
    modules = {}
    for name, parts in sorted(keys.items()):
        theirs = _name(header, name)
        modules[theirs] = _module(Group(header, theirs, parts))
    return Claims(config, modules)


def _name(header: Header, module: str) -> str:
    if module == "output":
        return "lm_head"
    place = place_of(module)
    if place.stack != "layers" or place.kind not in _NAMES:
        raise AdapterError(
            f"{header.adapter}: torchtune's {module} has no known name in transformers",
            "take the PEFT adapter that torchtune writes beside this one",
        )
    return f"model.layers.{place.layer}.{_NAMES[place.kind]}"


def _module(group: Group) -> ModuleSpec:
    (r, d_in), (d_out, columns) = group.shape("lora_a", 2), group.shape("lora_b", 2)
    group.check(r == columns)
    scaling = group.header.said().scaling_of(group.module, r)
    units = rows = None
    if group.module.endswith(("q_proj", "k_proj")):
        rows = partial(_rotary_rows, _head_dim(group, d_out))
        units = partial(_with_rows, rows)
    plain = group.spec(("lora_a", "lora_b"), units, d_out=d_out, d_in=d_in, rank=r, scaling=scaling)
    return dora(group, plain, "magnitude", rows=rows) if "magnitude" in group else plain


def _head_dim(group: Group, d_out: int) -> int:
    """Rows of a head, from the base model's config through the adapter's own."""
    said = group.header.said().raw.get("head_dim") or group.header.metadata.get("head_dim")
    size = int(said) if said else 0
    if size < 2 or size % 2 or d_out % size:
        group.refuse(
            "its rows are in torchtune's rotary order, which depends on the size of a head",
            'add "head_dim" to adapter_config.json, or take the PEFT adapter that torchtune '
            "writes beside this one",
        )
    return size


def _with_rows(rows: Callable[[Tensor], Tensor], a: Tensor, b: Tensor) -> Units:
    return a, rows(b)


def _rotary_rows(head_dim: int, rows: Tensor) -> Tensor:
    """Rows from pairs (torchtune) to halves (transformers), head by head."""
    pairs = rows.reshape(len(rows) // head_dim, head_dim // 2, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)


TORCHTUNE = Dialect("torchtune", "torchtune", _recognises, _claim)
