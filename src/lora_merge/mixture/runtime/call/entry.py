"""Where a call enters and leaves a model, or a part of it that has tokens of its own."""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import nn

from lora_merge.errors import MethodError
from lora_merge.mixture.runtime.call.cache_tags import check_tag, tag
from lora_merge.mixture.runtime.call.generation import generation, refuse_schedulers
from lora_merge.mixture.runtime.call.hooks import body_of
from lora_merge.mixture.runtime.call.in_force import InForce, Switch
from lora_merge.mixture.runtime.call.kv_state import Companion, cache_name, companion_of, tokens_in
from lora_merge.mixture.runtime.call.passes import (
    Pass,
    Stage,
    begin,
    carry_through,
    current,
    end,
    is_checkpointing,
)
from lora_merge.mixture.runtime.call.tokens import PACKED_BY_SCHEDULER, Tokens, read_tokens


class Before(Protocol):
    """What runs before a part of the model, and looks at what it returns: `two_pass`, `by_text`."""

    def before(
        self, passed: Pass, body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """The part is about to run."""

    def after(self, passed: Pass, stage: Stage, output: Any) -> None:
        """It has run."""


class Entry:
    """The hooks of a model, or of one of its parts: they make the pass and tell it where it is.

    Args:
        switch: Of the mixture.
        name: Of the mixture, under which its state lies on a cache.
        module: The part.
        first: What runs before this part, or None.
    """

    def __init__(
        self,
        switch: Switch,
        name: str,
        module: nn.Module,
        *,
        first: Before | None = None,
    ) -> None:
        self.switch, self.name, self.module, self.first = switch, name, module, first
        self.names = _named(module)
        self.cache = cache_name(self.names)
        self.handles = [
            module.register_forward_pre_hook(self.enter, with_kwargs=True),
            module.register_forward_hook(self.leave, with_kwargs=True, always_call=True),
        ]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()

    # -- in --------------------------------------------------------------------------------------

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook: begins the pass, or goes one stage deeper."""
        passed = self._pass_through(module)
        if passed is None:
            if current(self.switch) is None:  # idle, not inside a first pass
                check_tag(self._cache_in(args, kwargs), self.name, self.switch.now())
            return None
        gate = passed.gate
        began = gate if passed.stage is None else passed.stage.gate
        stage = passed.stage = Stage(module, began, passed.stage)
        check_tag(self._cache_in(args, kwargs), self.name, began)
        if torch.is_grad_enabled() and module.training and not torch.compiler.is_compiling():
            carry_through(module, self.switch)
        if not gate.needs_tokens:
            return None
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        self._refuse_schedulers(gate, given)
        told = generation()
        if told is not None and self.cache is not None and getattr(module, "is_decoder", True):
            stage.prompt = told.prompt
        twice = gate.spec.signal == "hidden"
        if gate.remembers or twice:
            kwargs = self._with_cache(module, given, kwargs)
            given = {**given, **kwargs}
            stage.companion = self._companion(given, twin=twice)
        masks = gate.remembers or gate.observe is not None
        stage.past = self._past(stage, given, masks)
        stage.tokens = read_tokens(given, stage.past, masks=masks)
        _check_rows(gate, stage.tokens, told.rows if told else None)
        self._refuse_unseen(gate, stage)
        if gate.spec.decides_before and self.first is not None:
            self.first.before(passed, module, args, kwargs)
        return args, kwargs

    def _cache_in(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The cache among a call's arguments, or None."""
        if self.cache is None:
            return None
        found = kwargs.get(self.cache)
        if found is None and args and self.cache in self.names[: len(args)]:
            found = args[self.names.index(self.cache)]
        return found

    def _pass_through(self, module: nn.Module) -> Pass | None:
        """The pass that this call belongs to; None where there is nothing to tell it."""
        passed = current(self.switch)
        if passed is not None and any(stage.module is module for stage in _stages(passed)):
            end(passed)  # left behind by an interrupt: nobody is inside himself
            passed = current(self.switch)
        if passed is not None:
            return None if passed.bypass else passed
        gate, replay = self.switch.gate_of_call()
        if gate.is_idle:
            return None
        passed = begin(self.switch, gate)
        passed.replay = replay
        return passed

    def _with_cache(
        self, module: nn.Module, given: Mapping[str, Any], kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """The arguments with a cache that is ours, where the model would make one of its own."""
        if self.cache is None or given.get(self.cache) is not None:
            return kwargs
        if not _wants_cache(module, given):
            return kwargs
        from transformers import DynamicCache, EncoderDecoderCache

        config: Any = getattr(module, "config", None)
        made: Any = DynamicCache(config=config)
        if getattr(config, "is_encoder_decoder", False):
            made = EncoderDecoderCache(made, DynamicCache(config=config))
        return {**kwargs, self.cache: made}

    def _companion(self, given: Mapping[str, Any], *, twin: bool) -> Companion | None:
        cache = given.get(self.cache) if self.cache else None
        if cache is None or not hasattr(cache, "get_seq_length"):
            return None
        return companion_of(cache, self.name, twin=twin)

    def _past(self, stage: Stage, given: Mapping[str, Any], masks: bool) -> int:
        """Tokens before those of this call, where that matters."""
        if stage.companion is not None:
            return stage.companion.seen
        cache = given.get(self.cache) if self.cache and masks else None
        return (tokens_in(cache, exact=True) or 0) if hasattr(cache, "get_seq_length") else 0

    def _refuse_unseen(self, gate: InForce, stage: Stage) -> None:
        """Refuse a text of which some tokens are in a cache that nothing can be kept beside."""
        tokens, told = stage.tokens, generation()
        if self.cache is not None or told is None or told.prompt is None or tokens is None:
            return
        follows = gate.remembers or gate.spec.decides_before
        if follows and tokens.length is not None and tokens.length < told.prompt:
            raise MethodError(
                f"the {gate.spec.preset} gate needs to know the tokens before, which this model "
                "keeps where nothing can be kept beside them",
                "generate with use_cache=False, or use a gate that looks at each token alone",
            )

    def _refuse_schedulers(self, gate: InForce, given: Mapping[str, Any]) -> None:
        """Refuse batches of a scheduler, whose tokens are those of many requests at many places."""
        if any(given.get(name) is not None for name in PACKED_BY_SCHEDULER):
            refuse_schedulers(gate)

    # -- out -------------------------------------------------------------------------------------

    def leave(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Forward hook: one stage back, or the end of the pass."""
        passed = current(self.switch)
        stage = None if passed is None else passed.stage
        if passed is None or stage is None or stage.module is not module:
            return
        if output is not None and self.cache is not None:
            cache = self._cache_in(args, kwargs)
            made = getattr(output, self.cache, None) if cache is None else cache
            tag(made, self.name, stage.gate)
        if output is not None and stage.tokens is not None:
            self._count(stage)
            if self.first is not None:
                self.first.after(passed, stage, output)
        passed.stage = outer = stage.outer
        if outer is None:
            end(passed)
        else:
            outer.after = _after(stage, outer, output)

    def _count(self, stage: Stage) -> None:
        """What a cache has seen; a body and its head see the same tokens of the same cache."""
        tokens, companion = stage.tokens, stage.companion
        if stage.counted or tokens is None or tokens.length is None or companion is None:
            return
        companion.seen += tokens.length
        outer = stage.outer
        while outer is not None:
            outer.counted = outer.companion is companion
            outer = outer.outer


def _after(stage: Stage, outer: Stage, output: Any) -> Tokens | None:
    """What is seen after a part: its tokens, of which a head may take a few."""
    tokens = stage.current
    if tokens is None or outer.tokens is None:
        return tokens
    whole = getattr(output, "last_hidden_state", None)
    return replace(tokens, kept=outer.tokens.kept, whole=whole, encoded=None)


def parts_of(model: nn.Module, targets: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """The model and those of its parts that may have tokens of their own, outermost first.

    Those are its body, and what transformers would load as a model by itself and holds targets.

    Args:
        model: The model.
        targets: The wrapped modules.
    """
    wrapped, body = {id(target) for target in targets}, body_of(model)
    for module in model.modules():
        is_model = hasattr(module, "config") and hasattr(module, "base_model_prefix")
        is_model = is_model and bool(_named(module))  # PEFT's shells pass on whatever they get
        holds = is_model and any(id(inner) in wrapped for inner in module.modules())
        if module is model or module is body or holds:
            yield module


def _named(module: nn.Module) -> tuple[str, ...]:
    """What a part calls its arguments."""
    found = inspect.signature(module.forward).parameters.values()
    return tuple(p.name for p in found if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))


def refuse_other_tokens(model: nn.Module, targets: Mapping[str, nn.Module]) -> None:
    """Refuse modules that read no text, of which a first pass over the text decides nothing.

    Raises:
        MethodError: Naming some.
    """
    body = body_of(model)
    for part in parts_of(model, targets.values()):
        reads = _named(part)
        if part in (model, body) or "input_ids" in reads or "inputs_embeds" in reads:
            continue
        inside = {id(module) for module in part.modules()}
        lost = [name for name, target in targets.items() if id(target) in inside]
        raise MethodError(
            f"a first pass over the text cannot decide for {lost[0]} ({len(lost)} modules), "
            f"which reads no text but what goes into a {type(part).__name__}",
            "leave those modules out, or use a gate that looks at each module's own input",
        )


def _stages(passed: Pass) -> Iterator[Stage]:
    stage = passed.stage
    while stage is not None:
        yield stage
        stage = stage.outer


def _check_rows(gate: InForce, tokens: Tokens | None, given_rows: int | None) -> None:
    """Refuse requests that are not those of the batch's rows."""
    weights = gate.weights
    if tokens is None or weights is None or not gate.is_per_row:
        return
    count, rows = len(weights), tokens.rows
    repeated = count == given_rows and rows % count == 0  # beams repeat each row in place
    if rows != count and not repeated:
        raise MethodError(
            f"the batch has {rows} rows, and there are requests for {count}",
            "name one expert for each row of the batch, or one for all; where a pipeline has put "
            "other rows beside yours (guidance without a prompt), name theirs too, in its order",
        )


def _wants_cache(body: nn.Module, given: Mapping[str, Any]) -> bool:
    """Whether the body would make a cache: then it has to be ours, to have a companion."""
    config = getattr(body, "config", None)
    use = given.get("use_cache")
    if use is None:
        use = getattr(config, "use_cache", False)
    return bool(use) and _is_decoder(body, config) and not is_checkpointing(body)


def _is_decoder(body: nn.Module, config: Any) -> bool:
    """Encoders of the BERT family have `use_cache` in their config and never a cache."""
    if hasattr(body, "is_decoder"):
        return bool(body.is_decoder)
    bert_like = hasattr(config, "is_decoder") and hasattr(config, "type_vocab_size")
    seq2seq = getattr(config, "is_encoder_decoder", False)
    return bool(getattr(config, "is_decoder", True)) if bert_like or seq2seq else True
