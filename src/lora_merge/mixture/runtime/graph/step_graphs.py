"""A decoded token as one recorded graph: what the device does again, the host need not say again.

Without a graph the host launches some hundred kernels for every token and asks each module what it
is to do. Recorded once, a step is: copy the inputs, replay, copy the output. For models that keep
keys and values in a static cache, and gates that look at each token alone.
"""

import threading
import warnings
import weakref
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from lora_merge.errors import LoraMergeWarning, MethodError
from lora_merge.mixture.gates.gate import GateSpec
from lora_merge.mixture.runtime.call.in_force import InForce, Switch
from lora_merge.mixture.runtime.graph.cache_state import MovedError, left_alone, state_of
from lora_merge.mixture.runtime.graph.recorded_step import CACHE, Call, Step, places_of
from lora_merge.mixture.runtime.graph.recorder import recorder_for

_MOST = 4  # steps that are kept: of so many batch shapes, caches and gates
_OTHER_CACHES = ("assistant_model", "prompt_lookup_num_tokens")  # what cuts caches back


def refuse_unrecordable(model: nn.Module, spec: GateSpec) -> None:
    """Refuse models and gates of which no step can be recorded.

    Raises:
        MethodError: With the reason.
    """
    recorder_for(next(model.parameters()).device)
    gate = InForce(spec)
    if spec.decides_before or gate.remembers:
        raise MethodError(
            f"graph=True: the {spec.preset} gate looks at the tokens before, so one step is not "
            "like the next",
            "leave graph out, or use a gate that looks at each token alone (arrow, meteora, smora)",
        )
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise MethodError("graph=True: the model has an encoder", "leave graph out")
    if not isinstance(model.__dict__.get("forward"), StepGraphs | None):
        raise MethodError(
            "graph=True: the model runs through a forward that something else put there",
            "leave graph out, or load the model without offloading",
        )


class StepGraphs:
    """A model's `forward` that records its decoding steps; whatever is no such step runs as ever.

    Args:
        model: The model.
        switches: Those of all its mixtures.
    """

    def __init__(self, model: nn.Module, switches: Callable[[], list[Switch]]) -> None:
        self.model, self.switches = model, switches
        self.recorder = recorder_for(next(model.parameters()).device)
        self._steps: list[Step] = []
        self._refused: list[tuple[Any, ...]] = []
        self._busy = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the model records its own."""
        return {"model": self.model, "switches": self.switches, "recorder": self.recorder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _steps=[], _refused=[], _busy=threading.Lock())

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        kind: Any = type(self.model)
        return MethodType(kind.forward, self.model)

    @property
    def recorded(self) -> int:
        """How many steps are kept."""
        return len(self._steps)

    def forget(self) -> None:
        """Record anew: the model has moved or changed."""
        self._steps.clear()
        self._refused.clear()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own."""
        if args or not self._is_step(kwargs) or not self._busy.acquire(blocking=False):
            return self.__wrapped__(*args, **kwargs)
        try:
            call = Call.of(kwargs)
            gates = tuple(switch.now() for switch in self.switches())
            stream = _stream(call)
            for step in self._steps:
                if step.suits(call, gates, stream):
                    return step.run(call)
            made = self._record(call, gates, stream)
            return made.run(call) if made else self.__wrapped__(**kwargs)
        finally:
            self._busy.release()

    def _is_step(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether this is one more token for each row, and nobody has to see it run."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or self.model.training:
            return False
        cache = kwargs.get(CACHE)
        static = getattr(cache, "is_compileable", False) and getattr(cache, "layers", None)
        if not static or not all(getattr(layer, "is_initialized", False) for layer in static):
            return False
        given = [kwargs.get(name) for name in ("input_ids", "inputs_embeds")]
        lengths = [one.shape[1] for one in given if isinstance(one, Tensor) and one.dim() > 1]
        if lengths != [1] or kwargs.get("labels") is not None:
            return False
        return all(_is_alike(switch.now()) for switch in self.switches())

    def _record(self, call: Call, gates: tuple[InForce, ...], stream: int) -> Step | None:
        """A new step; None, and a warning once, where the device has to be asked in between."""
        if call.like in self._refused:
            return None
        static = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in call.leaves]
        mine = Call(None, static, call.spec, call.like)
        kwargs = {**tree_unflatten(static, call.spec), CACHE: call.cache}
        run = lambda: self.__wrapped__(**kwargs)  # noqa: E731
        try:
            with left_alone(call.cache) as check_left:
                self.recorder.warm(run)
                check_left()
            with left_alone(call.cache):
                output, replay = self.recorder.record(run)
        except (RuntimeError, MovedError) as error:
            self._refused.append(call.like)
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            text = f"this model's decoding step cannot be recorded ({first}); it runs without graph"
            warnings.warn(text, LoraMergeWarning, stacklevel=5)
            return None
        at = id(call.cache)  # no reference: what flattens keeps the function until a collection
        leaves, spec = tree_flatten(output, is_leaf=lambda leaf: id(leaf) == at)
        held = [tensors for tensors, _ in map(state_of, call.cache.layers)]
        places = list(places_of(self.model))
        named = [CACHE if leaf is call.cache else leaf for leaf in leaves]
        cache = weakref.ref(call.cache)
        step = Step(mine, gates, stream, places, cache, held, named, spec, replay)
        self._steps = [step, *self._steps[: _MOST - 1]]
        return step


def _is_alike(gate: InForce) -> bool:
    """Whether one step under a gate is like the next, and nobody looks on."""
    seen = gate.observe is not None or gate.observe_hidden is not None or gate.only is not None
    return gate.is_idle or not (gate.spec.decides_before or gate.remembers or seen)


def _stream(call: Call) -> int:
    """Where the call runs: what another stream replays at once wants memory of its own."""
    on = next((leaf.device for leaf in call.leaves if isinstance(leaf, Tensor)), None)
    return torch.cuda.current_stream(on).cuda_stream if on is not None and on.type == "cuda" else 0


def static_by_default(model: nn.Module, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `generate` with a static cache, which transformers need not compile for.

    Args:
        model: The model.
        kwargs: The arguments; a cache, or a kind of cache, that they name stays.
    """
    if not isinstance(model.__dict__.get("forward"), StepGraphs):
        return dict(kwargs)
    config = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    named = kwargs.get("cache_implementation") or getattr(config, "cache_implementation", None)
    own = kwargs.get(CACHE) is not None or kwargs.get("use_cache") is False
    others = any(kwargs.get(name) is not None for name in _OTHER_CACHES)
    found = {} if named or own or others else {"cache_implementation": "static"}
    return {"disable_compile": True, **found, **kwargs}


def record_steps(model: nn.Module, switches: Callable[[], list[Switch]]) -> StepGraphs:
    """Have a model record its steps from now on; one recorder serves all its mixtures."""
    there = model.__dict__.get("forward")
    if isinstance(there, StepGraphs):
        return there
    model.__dict__["forward"] = made = StepGraphs(model, switches)
    return made


def stop_recording(model: nn.Module) -> None:
    """Give the model its own `forward` back."""
    if isinstance(model.__dict__.get("forward"), StepGraphs):
        del model.__dict__["forward"]
