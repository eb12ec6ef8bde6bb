"""What `generate` was asked for: a forward call by itself does not tell a prompt from a draft."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from threading import Lock
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from lora_merge.errors import MethodError
from lora_merge.mixture.runtime.call.hooks import REGISTRY
from lora_merge.mixture.runtime.call.in_force import InForce, kept
from lora_merge.mixture.runtime.graph.step_graphs import static_by_default

_TEXTS = ("inputs_embeds", "input_ids")
_OTHERS = ("inputs", "pixel_values", "input_features")


@dataclass(frozen=True)
class Generation:
    """One call of `generate`.

    Attributes:
        rows: Rows it was given; beams and several answers repeat each in place.
        prompt: Tokens of each row that are the prompt, padding included; None if nobody knows.
    """

    rows: int
    prompt: int | None


# Model types that keep the state of a text in their modules: there is room for one at a time.
STATE_IN_MODULES = ("recurrent_gemma",)
_LOCK = Lock()
_GENERATING: set[int] = set()  # identities of such models

_SCHEDULE = "init_continuous_batching"  # what transformers' `generate_batch` begins with
_CURRENT: ContextVar[Generation | None] = ContextVar("lora_merge_generation", default=None)


def generation() -> Generation | None:
    """The call of `generate` that this thread is in, if any; compiled code cannot know it."""
    return None if torch.compiler.is_compiling() else _CURRENT.get()


@contextmanager
def _alone(model: nn.Module) -> Iterator[None]:
    """Let no two threads generate with a model that has room for one text."""
    if getattr(getattr(model, "config", None), "model_type", None) not in STATE_IN_MODULES:
        yield
        return
    with _LOCK:
        if id(model) in _GENERATING:
            raise MethodError(
                f"a {type(model).__name__} keeps the state of a text in its modules, and is "
                "generating another already",
                "generate one after another, or put the texts into one batch",
            )
        _GENERATING.add(id(model))
    try:
        yield
    finally:
        _GENERATING.discard(id(model))


class Generate:
    """A model's `generate` that says what it was given, and keeps the gate it began with.

    Args:
        model: The model.
        encodes: Whether what it is given goes to an encoder, and the decoder begins anew.
        own: What was in the place of its class's `generate` before, or None.
    """

    def __init__(
        self, model: nn.Module, *, encodes: bool, own: Callable[..., Any] | None = None
    ) -> None:
        self.model, self.encodes, self.own = model, encodes, own

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        kind: Any = type(self.model)
        return self.own or MethodType(kind.generate, self.model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own."""
        mixtures = list(getattr(self.model, REGISTRY, {}).values())
        for mixture in mixtures:
            mixture.warn_if_untrained()
        token = _CURRENT.set(_read(args, kwargs, encodes=self.encodes))
        try:
            with kept(mixture.switch for mixture in mixtures), _alone(self.model):
                return self.__wrapped__(*args, **static_by_default(self.model, kwargs))
        finally:
            _CURRENT.reset(token)


class Schedule:
    """A model's `init_continuous_batching` that refuses gates which have to know whose tokens come.

    The scheduler calls the model from a thread of its own, where an error would never be heard of.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own."""
        for mixture in getattr(self.model, REGISTRY, {}).values():
            gate = mixture.switch.now()
            if not gate.is_idle:
                refuse_schedulers(gate)
        kind: Any = type(self.model)
        return kind.init_continuous_batching(self.model, *args, **kwargs)


def refuse_schedulers(gate: InForce) -> None:
    """Refuse gates that cannot run on batches which a scheduler has packed of many requests.

    Raises:
        MethodError: With the reason.
    """
    if gate.remembers or gate.is_per_row or gate.spec.decides_before:
        raise MethodError(
            f"the {gate.spec.preset} gate has to know whose tokens a call holds, and a scheduler "
            "packs those of many requests into one",
            "use a gate that looks at each token alone (arrow, meteora, smora, spectr)",
        )


def _read(args: tuple[Any, ...], kwargs: Mapping[str, Any], *, encodes: bool) -> Generation | None:
    texts = [*(kwargs.get(name) for name in _TEXTS), *args[:1], kwargs.get("inputs")]
    text = next((t for t in texts if isinstance(t, Tensor) and _is_text(t)), None)
    others = [text, *(kwargs.get(name) for name in _OTHERS), *args[:1]]
    first = next((value for value in others if isinstance(value, Tensor)), None)
    if first is None:
        return None
    if encodes:
        text = kwargs.get("decoder_input_ids")
        return Generation(len(first), 1 if text is None else text.shape[1])
    return Generation(len(first), None if text is None else text.shape[1])


def _is_text(value: Tensor) -> bool:
    return value.dim() == (3 if value.is_floating_point() else 2)


def tell_generation(model: nn.Module) -> None:
    """Have `model.generate` say what it was given."""
    own = model.__dict__.get("generate")
    if callable(getattr(model, "generate", None)) and not isinstance(own, Generate):
        encodes = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        model.__dict__["generate"] = Generate(model, encodes=encodes, own=own)
    if hasattr(type(model), _SCHEDULE):
        model.__dict__[_SCHEDULE] = Schedule(model)


def stop_telling(model: nn.Module) -> None:
    """Give the model its own `generate` back."""
    if isinstance(model.__dict__.get(_SCHEDULE), Schedule):
        del model.__dict__[_SCHEDULE]
    told = model.__dict__.get("generate")
    if isinstance(told, Generate):
        del model.__dict__["generate"]
        if told.own is not None:
            model.__dict__["generate"] = told.own
