"""Which gate a KV cache was made under: keys and values of one gate are wrong under another.

A saved system prompt, a turn of a conversation: the tag lies on the cache object, by the mixture's
name, and goes with its copies and pickles.
"""

from typing import Any

import torch

from lora_merge.errors import MethodError
from lora_merge.mixture.runtime.call.in_force import InForce
from lora_merge.mixture.runtime.call.kv_state import tokens_in

_ATTRIBUTE = "lora_merge_made_under"


def check_tag(kv_cache: Any, name: str, gate: InForce) -> None:
    """Refuse a cache that another gate has filled.

    Args:
        kv_cache: A transformers cache, or None.
        name: Of the mixture.
        gate: In force now.

    Raises:
        MethodError: With both gates.
    """
    if kv_cache is None or torch.compiler.is_compiling() or not hasattr(kv_cache, "__dict__"):
        return
    made: dict[str, Any] = kv_cache.__dict__.get(_ATTRIBUTE, {})
    before, now = made.get(name), None if gate.is_idle else gate.tag
    if before == now or not hasattr(kv_cache, "get_seq_length"):
        return
    if before is None:
        if tokens_in(kv_cache, exact=False) in (0, None):
            return
        raise MethodError(
            f"mixture {name}: this KV cache was filled while the mixture was not active, "
            f"and would be read under {_shown(now)}",
            "start from an empty cache",
        )
    if tokens_in(kv_cache, exact=False) == 0:  # emptied: what it held is gone
        del made[name]
        return
    raise MethodError(
        f"mixture {name}: this KV cache was made under {_shown(before)}, and would be read under "
        f"{_shown(now)}",
        "read it under the gate, experts and requests it was made under, or start from an empty "
        "cache",
    )


def tag(kv_cache: Any, name: str, gate: InForce) -> None:
    """Note the gate that a cache has been filled under."""
    if torch.compiler.is_compiling() or not hasattr(kv_cache, "get_seq_length"):
        return
    kv_cache.__dict__.setdefault(_ATTRIBUTE, {})[name] = gate.tag


def _shown(tag: tuple[Any, ...] | None) -> str:
    if tag is None:
        return "the base model"
    kind, *rest = tag
    if kind == "gate":
        return f"the {rest[0].preset} gate of {', '.join(name for name, _ in rest[1])}"
    rows = ["+".join(f"{n} {w:g}" for (n, _), w in row) or "no expert" for row in rest[0]]
    return f"requests for {', '.join(rows)}"
