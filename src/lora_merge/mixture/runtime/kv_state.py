"""What a mixture keeps beside a KV cache: a second cache, and decisions per sequence.

A two-pass gate needs the keys and values of both passes; a sequence gate needs what it decided at
prefill. Both belong to the sequences that a cache holds, so they live on the cache object and
follow it: beam search reorders them, assisted decoding crops them, a copied prefix copies them.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lora_merge.errors import MethodError
from lora_merge.mixture.gates.memory import REMEMBERED

_ATTRIBUTE = "lora_merge_companions"


@dataclass(eq=False)
class Companion:
    """State of one mixture for the sequences of one cache.

    Attributes:
        twin: Cache of the first pass, None if the gate has none.
        rows: Tensors whose first dimension is the cache's batch.
        steps: Decoding steps since prefill.
    """

    twin: Any = None
    rows: dict[Any, Tensor] = field(default_factory=dict)
    steps: int = 0

    def select(self, indices: Tensor) -> None:
        """Keep these rows of the batch, in this order."""
        self.rows = {k: _select(t, indices) for k, t in self.rows.items()}

    def repeat(self, times: int) -> None:
        """Repeat each row of the batch in place."""
        self.rows = {k: t.repeat_interleave(times, dim=0) for k, t in self.rows.items()}


def companion_of(kv_cache: Any, name: str, *, twin: bool) -> Companion:
    """The companion of a cache, made at its first use.

    Args:
        kv_cache: A transformers cache.
        name: Name of the mixture.
        twin: Whether the first pass needs a cache of its own.

    Raises:
        MethodError: If the cache was filled without this mixture, so its first pass is lost.
    """
    companions: dict[str, Companion] = kv_cache.__dict__.setdefault(_ATTRIBUTE, {})
    if name not in companions:
        second = None
        if twin:
            if int(kv_cache.get_seq_length()) > 0:
                raise MethodError(
                    f"mixture {name}: this KV cache was filled while the mixture was not active, "
                    "so the first pass of its gate is not in it",
                    "start from an empty cache",
                )
            empty = {k: v for k, v in kv_cache.__dict__.items() if k != _ATTRIBUTE}
            second = copy.copy(kv_cache)
            second.__dict__ = copy.deepcopy(empty)
            second.__class__ = getattr(type(kv_cache), "plain", type(kv_cache))
        companions[name] = Companion(second)
        if not hasattr(type(kv_cache), "plain"):
            kv_cache.__class__ = _following(type(kv_cache))  # type: ignore[arg-type]
    return companions[name]


@cache
def _following(kind: Any) -> type:
    """A subclass of a cache class whose batch operations reach the companions as well."""

    def follow(method: str) -> Any:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            if method == "crop":
                _refuse_forgetting(self.__dict__[_ATTRIBUTE].values())
            result = getattr(kind, method)(self, *args, **kwargs)
            for companion in self.__dict__[_ATTRIBUTE].values():
                if companion.twin is not None:
                    getattr(companion.twin, method)(*args, **kwargs)
                if method in ("reorder_cache", "batch_select_indices"):
                    companion.select(args[0] if args else next(iter(kwargs.values())))
                elif method == "batch_repeat_interleave":
                    companion.repeat(args[0] if args else next(iter(kwargs.values())))
                elif method == "reset":
                    companion.rows, companion.steps = {}, 0
            return result

        return call

    names = ("reorder_cache", "batch_select_indices", "batch_repeat_interleave", "crop", "reset")
    methods = {name: follow(name) for name in names if hasattr(kind, name)}
    return type(kind.__name__, (kind,), {"plain": kind, "__module__": kind.__module__, **methods})


def _refuse_forgetting(companions: Iterable[Companion]) -> None:
    """A sum over tokens cannot give the last ones back."""
    for companion in companions:
        if any(isinstance(key, tuple) and key[0] == REMEMBERED for key in companion.rows):
            raise MethodError(
                "tokens are taken back from the KV cache: a gate with memory cannot forget them",
                "decode without an assistant, or with a gate whose memory is 0",
            )


def _select(tensor: Tensor, indices: Tensor) -> Tensor:
    if tensor.shape[0] == 1:
        return tensor
    return tensor.index_select(0, torch.as_tensor(indices, device=tensor.device))
