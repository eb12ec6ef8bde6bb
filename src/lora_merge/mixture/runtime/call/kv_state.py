"""What a mixture keeps beside a KV cache: a second cache, and decisions per sequence.

A two-pass gate needs the keys and values of both passes; a gate that remembers needs what it saw or
decided. Both belong to the sequences that a cache holds, so they live on the cache object and
follow it: beam search reorders them, assisted decoding crops them, a copied prefix copies them.
"""

import copy
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lora_merge.errors import MethodError
from lora_merge.mixture.gates.memory import REMEMBERED

_ATTRIBUTE = "lora_merge_companions"
CACHE_NAMES = ("past_key_values", "cache_params")  # what models call a cache among their arguments
_FOLLOWED = (
    "reorder_cache",
    "batch_select_indices",
    "batch_repeat_interleave",
    "crop",
    "reset",
    "activate_past_recording",
)


@dataclass(eq=False)
class Companion:
    """State of one mixture for the sequences of one cache.

    Attributes:
        twin: Cache of the first pass, None if the gate has none.
        rows: Tensors whose first dimension is the cache's batch.
        seen: Tokens of each sequence that the mixture has seen.
        steps: Decoding steps since prefill.
    """

    twin: Any = None
    rows: dict[Any, Tensor] = field(default_factory=dict)
    seen: int = 0
    steps: int = 0

    def follow(self, method: str, *args: Any, **kwargs: Any) -> None:
        """Do what was done to the cache."""
        if self.twin is not None:
            getattr(self.twin, method)(*args, **kwargs)
        value: Any = args[0] if args else next(iter(kwargs.values()), None)
        if method in ("reorder_cache", "batch_select_indices"):
            self.rows = {k: _select(t, value) for k, t in self.rows.items()}
        elif method == "batch_repeat_interleave":
            self.rows = {k: t.repeat_interleave(value, dim=0) for k, t in self.rows.items()}
        elif method == "crop":
            self.seen -= abs(int(value))
        elif method == "reset":
            self.rows, self.seen, self.steps = {}, 0, 0

    def check(self, method: str, *args: Any, **kwargs: Any) -> None:
        """Refuse, before anything is done, what cannot be followed: sums cannot be taken back."""
        value = args[0] if args else next(iter(kwargs.values()), 0)
        remembers = any(isinstance(k, tuple) and k[0] == REMEMBERED for k in self.rows)
        if method == "crop" and int(value) and remembers:
            raise MethodError(
                "tokens are taken back from the KV cache: a gate with memory cannot forget them",
                "decode without an assistant, or with a gate whose memory is 0",
            )


def cache_name(parameters: tuple[str, ...]) -> str | None:
    """What a forward with these parameters calls its cache; None if it takes none."""
    return next((name for name in CACHE_NAMES if name in parameters), None)


def tokens_in(kv_cache: Any, *, exact: bool) -> int | None:
    """Tokens that a cache holds; None if it does not count them.

    Args:
        kv_cache: A transformers cache.
        exact: Whether it is worth waiting for a device that counts them.
    """
    try:
        length = kv_cache.get_seq_length()
    except ValueError:  # state-space layers alone: they count nothing
        return None if kv_cache.has_previous_state() else 0
    return int(length) if exact or isinstance(length, int) else None


def companion_of(kv_cache: Any, name: str, *, twin: bool) -> Companion:
    """The companion of a cache, made at its first use.

    Args:
        kv_cache: A transformers cache.
        name: Name of the mixture.
        twin: Whether the first pass needs a cache of its own.

    Raises:
        MethodError: If the cache holds tokens that this mixture has not seen.
    """
    companions: dict[str, Companion] = kv_cache.__dict__.setdefault(_ATTRIBUTE, {})
    found = companions.get(name)
    held = tokens_in(kv_cache, exact=found is None)
    if found is None:
        if held is None or held > 0:
            raise MethodError(
                f"mixture {name}: this KV cache was filled while the mixture was not active, "
                "so what its gate needs of those tokens is not in it",
                "start from an empty cache",
            )
        found = companions[name] = Companion(_twin(kv_cache) if twin else None)
        if not hasattr(type(kv_cache), "plain"):
            kv_cache.__class__ = _following(type(kv_cache))  # type: ignore[arg-type]
    elif held is not None and held != found.seen:
        raise MethodError(
            f"mixture {name}: this KV cache holds {held} tokens, of which the mixture has seen "
            f"{found.seen}: it was not active while the others were added",
            "start from an empty cache",
        )
    return found


def _twin(kv_cache: Any) -> Any:
    """An empty cache of the same kind; streams are shared, since they cannot be copied."""
    second = copy.copy(kv_cache)
    kept = {k: v for k, v in kv_cache.__dict__.items() if k != _ATTRIBUTE}
    memo = {id(v): v for v in kept.values() if isinstance(v, torch.Stream)}
    second.__dict__ = copy.deepcopy(kept, memo)
    second.__class__ = getattr(type(kv_cache), "plain", type(kv_cache))
    return second


def _empty(kind: Any) -> Any:
    """A following cache without contents, which a copy or a file brings."""
    following: Any = _following(kind)
    return following.__new__(following)


@cache
def _following(kind: Any) -> type:
    """A subclass of a cache class whose batch operations reach the companions as well."""

    def follow(method: str) -> Any:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            companions = self.__dict__.get(_ATTRIBUTE, {}).values()
            for companion in companions:
                companion.check(method, *args, **kwargs)
            result = getattr(kind, method)(self, *args, **kwargs)
            for companion in companions:
                companion.follow(method, *args, **kwargs)
            return result

        return call

    def reduce(self: Any, protocol: Any) -> Any:
        return _empty, (kind,), self.__dict__

    methods = {name: follow(name) for name in _FOLLOWED if hasattr(kind, name)}
    methods["__reduce_ex__"] = reduce
    return type(kind.__name__, (kind,), {"plain": kind, "__module__": kind.__module__, **methods})


def _select(tensor: Tensor, indices: Tensor) -> Tensor:
    if tensor.shape[0] == 1:
        return tensor
    return tensor.index_select(0, torch.as_tensor(indices, device=tensor.device))
