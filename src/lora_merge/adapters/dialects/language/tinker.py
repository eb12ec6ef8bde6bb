"""Tinker's own adapters: PEFT's names, experts as 3-D factors of which one may be shared.

`…experts.w1.lora_A.weight (E or 1, r, in)` and `.lora_B.weight (E or 1, out, r)`: a first axis of 1
is a factor that all experts share; an empty tensor stands for a projection that the model lacks;
`unembed_tokens` is the head. Shapes as its cookbook's converter to PEFT takes them.
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

_EXPERT = re.compile(r"^(?P<stem>.+\.experts)\.(?P<leaf>w[123])\.lora_(?P<half>[AB])\.weight$")
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
    ignored, rest = {}, {}
    for key, entry in header.entries.items():
        match = _EXPERT.match(canonical(key))
        if match is None:
            rest[key] = entry
        elif 0 in entry[1]:
            ignored[key] = "empty: the model lacks this projection"
        else:
            halves.setdefault((match["stem"], match["leaf"]), {})[match["half"]] = key
    claims = PEFT_LORA.claim(replace(header, entries=rest))
    modules = {}
    for name, spec in claims.modules.items():
        new = "lm_head" if _HEAD.search(name) else name
        modules[new] = replace(spec, name=new)
    keys = [key for pair in halves.values() for key in pair.values()]
    count = max((header.entries[key][1][0] for key in keys), default=1)
    for (stem, leaf), pair in halves.items():
        modules |= _experts(stem, leaf, pair, count, header, claims.config)
    return replace(claims, modules=modules, ignored={**claims.ignored, **ignored})


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
    name = leaf if _KEPT in stem else _LEAVES[leaf]
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


TINKER = Dialect("tinker", "Tinker", _recognises, _claim)
