"""Tinker's own adapters, and SGLang's shared outer factors: PEFT's names, experts in 3-D factors.

`…experts.w1.lora_A.weight (E or 1, r, in)` and `.lora_B.weight (E or 1, out, r)`: a first axis of 1
is a factor that all experts share; an empty tensor stands for a projection that the model lacks;
`unembed_tokens` is the head. Shapes as Tinker's cookbook takes them in its converter to PEFT.

Megatron-Bridge writes for SGLang (`experts_shared_outer_loras`) the names `gate_proj`, `up_proj`
and `down_proj`, shares the A of the first two and the B of the last, and stores the other half as
such a stack or as a matrix for each expert (`…experts.3.gate_proj.lora_B.weight`).
"""

import re
from dataclasses import replace
from functools import partial

from torch import Tensor

from lora_merge.adapters.config import AdapterConfig
from lora_merge.adapters.dialects.dialect import Claims, Dialect, Header
from lora_merge.adapters.dialects.peft_lora import PEFT_LORA
from lora_merge.adapters.dialects.spelling import canonical
from lora_merge.adapters.forms import ModuleSpec
from lora_merge.adapters.units import Recipe, Units
from lora_merge.errors import AdapterError
from lora_merge.files.tensor_file import DTYPES, widest_dtype

_LEAF = r"(?P<leaf>w[123]|gate_proj|up_proj|down_proj)\.lora_(?P<half>[AB])\.weight$"
_EXPERT = re.compile(r"^(?P<stem>.+\.experts)\." + _LEAF)
_ONE_EXPERT = re.compile(r"^(?P<stem>.+\.experts)\.(?P<expert>\d+)\." + _LEAF)
_LEAVES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
# Where the experts' modules kept Tinker's names in transformers 4.
_KEPT = "block_sparse_moe"
_HEAD = re.compile(r"(^|\.)unembed_tokens$")


def _recognises(header: Header) -> bool:
    """A stack of expert factors, or the head under Tinker's name."""
    return any(
        (len(shape) == 3 and _EXPERT.match(canonical(key))) or ".unembed_tokens.lora_" in key
        for key, (_, shape) in header.entries.items()
    )


def _claim(header: Header) -> Claims:
    halves: dict[tuple[str, str], dict[str, str]] = {}
    singles: dict[tuple[str, str], dict[int, dict[str, str]]] = {}
    ignored, rest = {}, {}
    for key, entry in header.entries.items():
        name = canonical(key)
        match, one = _EXPERT.match(name), _ONE_EXPERT.match(name)
        if one is not None:
            of_all = singles.setdefault((one["stem"], one["leaf"]), {})
            of_all.setdefault(int(one["expert"]), {})[one["half"]] = key
        elif match is None:
            rest[key] = entry
        elif 0 in entry[1]:
            ignored[key] = "empty: the model lacks this projection"
        else:
            halves.setdefault((match["stem"], match["leaf"]), {})[match["half"]] = key
    beside = {place: of_all for place, of_all in singles.items() if len(halves.get(place, ())) == 1}
    for place, of_all in singles.items():
        if place not in beside:  # ordinary modules
            rest |= {k: header.entries[k] for pair in of_all.values() for k in pair.values()}
    claims = PEFT_LORA.claim(replace(header, entries=rest)) if rest else Claims(header.said(), {})
    modules = {}
    for name, spec in claims.modules.items():
        new = "lm_head" if _HEAD.search(name) else name
        modules[new] = replace(spec, name=new)
    keys = [key for pair in halves.values() for key in pair.values()]
    count = max((header.entries[key][1][0] for key in keys), default=1)
    for (stem, leaf), pair in halves.items():
        of_all = beside.get((stem, leaf), {})
        if not of_all:
            modules |= _experts(stem, leaf, pair, count, header, claims.config)
        for expert, own in of_all.items():
            path = f"{stem}.{expert}.{_name(stem, leaf)}"
            modules[path] = _beside_a_shared_one(path, {**own, **pair}, own, header, claims.config)
    return replace(claims, modules=modules, ignored={**claims.ignored, **ignored})


def _name(stem: str, leaf: str) -> str:
    """What transformers calls an expert's projection."""
    return leaf if _KEPT in stem else _LEAVES.get(leaf, leaf)


def _beside_a_shared_one(
    path: str,
    pair: dict[str, str],
    own: dict[str, str],
    header: Header,
    config: AdapterConfig,
) -> ModuleSpec:
    """An expert with one factor of its own, a matrix, and one that all share, (1, ...)."""
    if len(own) != 1 or pair.keys() != {"A", "B"}:
        raise AdapterError(
            f"{header.adapter}: {path} has not one factor beside the one that all experts share",
            "the file is incomplete; get it again",
        )
    (code_a, a), (code_b, b) = header.entries[pair["A"]], header.entries[pair["B"]]
    a, b = (shape[1:] if len(shape) == 3 and shape[0] == 1 else shape for shape in (a, b))
    fits = len(a) == len(b) == 2 and a[0] == b[1] and 0 not in (*a, *b)
    if not fits or {code_a, code_b} - DTYPES.keys():
        raise AdapterError(
            f"{header.adapter}: {path}: A {code_a} {list(a)}, B {code_b} {list(b)} do not belong "
            "together",
            "save it again",
        )
    return ModuleSpec(
        name=path,
        form="linear",
        d_out=b[0],
        d_in=a[1],
        rank=a[0],
        scaling=config.scaling_of(path, a[0]),
        dtype=widest_dtype((code_a, code_b)),
        recipe=Recipe((pair["A"], pair["B"]), _flat),
    )


def _flat(a: Tensor, b: Tensor) -> Units:
    return a.flatten(0, -2), b.reshape(-1, b.shape[-1])


def _experts(
    stem: str, leaf: str, pair: dict[str, str], count: int, header: Header, config: AdapterConfig
) -> dict[str, ModuleSpec]:
    """One module per expert."""
    where = f"{header.adapter}: {stem}.{leaf}"
    if pair.keys() != {"A", "B"}:
        raise AdapterError(f"{where} has one of A and B", "the file is incomplete; get it again")
    (code_a, a), (code_b, b) = header.entries[pair["A"]], header.entries[pair["B"]]
    fits = len(a) == len(b) == 3 and a[1] == b[2] and {a[0], b[0]} <= {1, count}
    if not fits or {code_a, code_b} - DTYPES.keys():
        raise AdapterError(
            f"{where}: A {code_a} {list(a)}, B {code_b} {list(b)}: no factors of {count} experts",
            "save it again",
        )
    name = _name(stem, leaf)
    return {
        path: ModuleSpec(
            name=path,
            form="linear",
            d_out=b[1],
            d_in=a[2],
            rank=a[1],
            scaling=config.scaling_of(path, a[1]),
            dtype=widest_dtype((code_a, code_b)),
            recipe=Recipe((pair["A"], pair["B"]), partial(_one_of, expert=expert)),
        )
        for expert in range(count)
        for path in (f"{stem}.{expert}.{name}",)
    }


def _one_of(a: Tensor, b: Tensor, *, expert: int) -> Units:
    """An expert's factors, or the shared one where there is one for all."""
    return a[min(expert, len(a) - 1)], b[min(expert, len(b) - 1)]


TINKER = Dialect("tinker", "Tinker, or SGLang with shared outer factors", _recognises, _claim)
