"""One recorded step: its inputs, what it stands on, and how to do it again."""

import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from lora_merge.mixture.runtime.call.in_force import InForce
from lora_merge.mixture.runtime.graph.cache_state import state_of

CACHE = "past_key_values"

# Of a tensor of the model: where it hangs and by which name, itself, its address and its version,
# as trained gates are copied by the host; of a buffer, which a step may write, none.
Place: TypeAlias = tuple[dict[str, Any], str, Tensor, int, int | None]


def places_of(model: nn.Module) -> Iterator[Place]:
    """Every tensor of a model."""
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    known = held is module._parameters and not tensor.is_inference()
                    version = tensor._version if known else None
                    yield held, name, tensor, tensor.data_ptr(), version


@dataclass(frozen=True, eq=False)
class Call:
    """The arguments of one call, taken apart.

    Attributes:
        cache: The keys and values; None in what is kept of a call.
        leaves: All other arguments; the cache stands as None.
        spec: How they belong together.
        like: What another call must have in common with it, tensors but for their entries.
    """

    cache: Any
    leaves: list[Any]
    spec: TreeSpec
    like: tuple[Any, ...]

    @classmethod
    def of(cls, kwargs: Mapping[str, Any]) -> "Call":
        """Of a call's keywords."""
        leaves, spec = tree_flatten({**kwargs, CACHE: None})
        like = tuple(
            (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf
            for leaf in leaves
        )
        return cls(kwargs[CACHE], leaves, spec, like)


@dataclass(eq=False)
class Step:
    """A recorded step.

    Attributes:
        call: The arguments; its tensors are what a replay reads.
        gates: In force when it was recorded.
        stream: Where it was.
        places: Every tensor of the model.
        cache: Whose keys and values `held` are, unless it is gone.
        held: What a replay reads and writes of a cache, by layer and attribute.
        output: What a replay fills, the cache standing as None.
        spec: How it belongs together.
        replay: Does it all again.
    """

    call: Call
    gates: tuple[InForce, ...]
    stream: int
    places: "list[Place]"
    cache: "weakref.ref[Any]"
    held: list[dict[str, Tensor]]
    output: list[Any] = field(default_factory=list)
    spec: TreeSpec | None = None
    replay: Callable[[], object] = lambda: None

    def suits(self, call: Call, gates: tuple[InForce, ...], stream: int) -> bool:
        """Whether a replay would do what this call asks for."""
        mine = self.cache()
        return (
            (mine is None or mine is call.cache)
            and self.stream == stream
            and len(gates) == len(self.gates)
            and all(a is b for a, b in zip(gates, self.gates, strict=True))
            and self.call.spec == call.spec
            and self.call.like == call.like
            and all(
                at.get(name) is tensor
                and address == tensor.data_ptr()
                and (version is None or version == tensor._version)
                for at, name, tensor, address, version in self.places
            )
            and self._takes(call.cache)
        )

    def _takes(self, cache: Any) -> bool:
        """Whether the cache's tensors are the recorded ones, or can be brought there."""
        layers = [tensors for tensors, _ in map(state_of, cache.layers)]
        return len(layers) == len(self.held) and all(
            new.keys() == old.keys()
            and all(
                new[n].shape == old[n].shape and new[n].dtype == old[n].dtype
                and new[n].device == old[n].device
                for n in old
            )
            for new, old in zip(layers, self.held, strict=True)
        )  # fmt: skip

    def run(self, call: Call) -> Any:
        """The step with other tokens, and with another cache where the recorded one is gone."""
        for mine, given in zip(self.call.leaves, call.leaves, strict=True):
            if isinstance(mine, Tensor) and mine is not given:
                mine.copy_(given)
        for layer, held in zip(call.cache.layers, self.held, strict=True):
            for name, tensor in held.items():
                theirs = getattr(layer, name)
                if theirs is not tensor:
                    tensor.copy_(theirs)
                    setattr(layer, name, tensor)
        self.cache = weakref.ref(call.cache)
        self.replay()
        assert self.spec is not None
        fresh = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in self.output]
        return tree_unflatten([call.cache if leaf is CACHE else leaf for leaf in fresh], self.spec)
