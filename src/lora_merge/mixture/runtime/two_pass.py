"""X-LoRA's gate: a classifier on the last hidden state of a first pass, exact with a KV cache.

Position t's weights depend on positions <= t of the base model alone, so two caches make it exact:
one of the first pass, one of the mixed pass. The first pass skips every expert and the LM head.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_merge.errors import MethodError
from lora_merge.mixture.gates.gate import GateSpec, activate
from lora_merge.mixture.gates.memory import REMEMBERED, remember
from lora_merge.mixture.runtime.context import Context
from lora_merge.mixture.runtime.kv_state import Companion, companion_of

_WEIGHTS, _HIDDEN = "weights", "hidden"


class HiddenGate(nn.Module):
    """Classifier from hidden states to the weights of all modules.

    Args:
        spec: The gate.
        tensors: `classifier.<j>.weight|bias`.
        num_modules: N; the weights are per module unless the granularity is "model".
        dtype: Compute dtype of the classifier; hidden states are cast to it.
    """

    def __init__(
        self, spec: GateSpec, tensors: Mapping[str, Tensor], num_modules: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        linears = []
        for index in range(spec.depth):
            weight = tensors[f"classifier.{index}.weight"]
            layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=dtype)
            with torch.no_grad():
                layer.weight.copy_(weight)
                layer.bias.copy_(tensors[f"classifier.{index}.bias"])
            linears.append(layer.requires_grad_(False))
        self.layers = nn.ModuleList(linears)
        self.num_scores = 1 if spec.granularity == "model" else num_modules

    def forward(self, hidden: Tensor) -> Tensor:
        """Scores (B, S, N * n) from hidden states (B, S, width); N may be 1."""
        linears = self.linears
        state = hidden.to(linears[0].weight)
        for index, layer in enumerate(linears):
            state = layer(torch.relu(state) if index else state)
        return state

    @property
    def linears(self) -> list[nn.Linear]:
        """The layers, first to last."""
        return [layer for layer in self.layers if isinstance(layer, nn.Linear)]

    def tensors(self) -> dict[str, Tensor]:
        """The classifier as it is saved, float32 on the CPU."""
        out: dict[str, Tensor] = {}
        for index, layer in enumerate(self.linears):
            out[f"classifier.{index}.weight"] = layer.weight.detach().float().cpu().clone()
            out[f"classifier.{index}.bias"] = layer.bias.detach().float().cpu().clone()
        return out


class TwoPass:
    """Runs the first pass before every pass of the model's body.

    Args:
        name: Name of the mixture, under which its state lies on a cache.
        gate: The classifier.
        context: Of the mixture.

    Attributes:
        freeze_after: Skip the first pass after this many decoded tokens and keep the last weights.
        lagged: While decoding, take the weights from the previous token's mixed hidden state, and
            skip the first pass. Both are approximations; None and False are exact.
        observe: Called with every module's scores (T, n), weights (T, C) and expert numbers.
    """

    def __init__(self, name: str, gate: HiddenGate, context: Context) -> None:
        self.name, self.gate, self.context = name, gate, context
        self.freeze_after: int | None = None
        self.lagged = False
        self.observe: Callable[[Tensor, Tensor, tuple[int, ...]], None] | None = None

    def before(self, body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook of the body: decides the weights of this pass."""
        if not self.context.active or self.context.bypass:
            return None
        if torch.is_grad_enabled():
            _refuse_reentrant(body)
        cache, kwargs = own_cache(body, kwargs)
        companion = None if cache is None else companion_of(cache, self.name, twin=True)
        self.context.weights = self._weights(body, args, kwargs, companion)
        return args, kwargs

    def after(self, body: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Forward hook of the body: remembers what a lagged gate looks at."""
        cache = kwargs.get("past_key_values")
        if self.lagged and self.context.active and not self.context.bypass and cache is not None:
            state = companion_of(cache, self.name, twin=True)
            state.rows[_HIDDEN] = _hidden_of(output)[:, -1:].detach()

    def _weights(
        self,
        body: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        companion: Companion | None,
    ) -> Tensor:
        tokens = _tokens(args, kwargs)
        decoding = companion is not None and tokens == 1 and bool(companion.rows)
        if companion is not None and decoding:
            companion.steps += 1
            if self.freeze_after is not None and companion.steps > self.freeze_after:
                return companion.rows[_WEIGHTS]
            if self.lagged and _HIDDEN in companion.rows:
                return self._decide(companion.rows[_HIDDEN], companion)
        hidden = self.first_pass(body, kwargs, args, companion)
        weights = self._decide(hidden, companion)
        if companion is not None:
            companion.rows[_WEIGHTS] = weights.view(hidden.shape[0], hidden.shape[1], -1)[:, -1]
        return weights

    def _decide(self, hidden: Tensor, companion: Companion | None) -> Tensor:
        """Weights of all modules side by side, shape (T, N * C) or (T, C)."""
        spec = self.context.spec
        rows = self.gate(hidden)
        if spec.memory:
            mask = self.context.mask
            keep = mask if mask is not None and mask.shape == rows.shape[:2] else None
            store = None if companion is None else companion.rows
            rows = remember(store, (REMEMBERED,), rows, spec.memory, keep)
        scores = rows.view(rows.shape[0] * rows.shape[1], self.gate.num_scores, -1)
        weights = activate(scores, spec)
        if spec.null_expert:
            weights = weights[..., :-1]
        if self.observe is not None:
            everyone = tuple(range(weights.shape[-1]))
            for module in range(weights.shape[1]):
                self.observe(scores[:, module], weights[:, module], everyone)
        columns: Tensor = weights.flatten(1)
        return columns

    @torch.no_grad()
    def first_pass(
        self,
        body: nn.Module,
        kwargs: dict[str, Any],
        args: tuple[Any, ...] = (),
        companion: Companion | None = None,
    ) -> Tensor:
        """Hidden states of the base model (or, not bypassed, of the even mixture)."""
        context = self.context
        if companion is not None:
            kwargs = {**kwargs, "past_key_values": companion.twin}
        if kwargs.get("output_attentions"):
            kwargs = {**kwargs, "output_attentions": False}
        if context.spec.bypass:
            context.bypass = True
        else:
            columns = self.gate.linears[-1].out_features
            share = self.gate.num_scores / columns
            context.weights = torch.full((1, columns), share, device=_device(body))
        try:
            return _hidden_of(body.forward(*args, **kwargs))
        finally:
            context.bypass = False


def refuse_two_sequences(model: nn.Module) -> None:
    """An encoder and its decoder see different tokens; X-LoRA is defined on one sequence.

    Raises:
        MethodError: If the model has both.
    """
    if "decoder_input_ids" in inspect.signature(model.forward).parameters:
        raise MethodError(
            f"gate xlora: {type(model).__name__} has an encoder and a decoder, with tokens "
            "of their own; the gate's first pass is defined on one sequence",
            "use a gate that looks at each module's own input: arrow, spectr, meteora, smora",
        )


def _refuse_reentrant(body: nn.Module) -> None:
    """Reentrant checkpointing runs a backward pass per block, and all blocks share the gate."""
    for module in body.modules():
        if module.training and getattr(module, "gradient_checkpointing", False):
            function = getattr(module, "_gradient_checkpointing_func", None)
            if getattr(function, "keywords", {}).get("use_reentrant"):
                raise MethodError(
                    "gate xlora: reentrant gradient checkpointing would go through the gate once "
                    "for every block",
                    'model.gradient_checkpointing_enable({"use_reentrant": False})',
                )
            return


def own_cache(body: nn.Module, kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The pass's KV cache, made here if the body would make one, and the arguments with it."""
    cache = kwargs.get("past_key_values")
    if cache is None and _wants_cache(body, kwargs):
        from transformers import DynamicCache

        cache = DynamicCache(config=getattr(body, "config", None))
        return cache, {**kwargs, "past_key_values": cache}
    return cache, dict(kwargs)


def _wants_cache(body: nn.Module, kwargs: Mapping[str, Any]) -> bool:
    """Whether the body would make a cache of its own: then it has to be ours, to have a twin."""
    config = getattr(body, "config", None)
    use = kwargs.get("use_cache")
    if use is None:
        use = getattr(config, "use_cache", False)
    decoder = not getattr(config, "is_encoder_decoder", False)
    checkpointing = body.training and getattr(body, "gradient_checkpointing", False)
    causal = "past_key_values" in inspect.signature(body.forward).parameters
    return bool(use) and decoder and causal and not checkpointing and _is_decoder(config)


def _is_decoder(config: Any) -> bool:
    """Encoders of the BERT family have `use_cache` in their config and never a cache."""
    bert_like = hasattr(config, "is_decoder") and hasattr(config, "type_vocab_size")
    return bool(getattr(config, "is_decoder", True)) if bert_like else True


def _tokens(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    for value in (kwargs.get("inputs_embeds"), kwargs.get("input_ids"), *args):
        if isinstance(value, Tensor):
            return value.shape[1]
    return 0


def _hidden_of(output: Any) -> Tensor:
    hidden = getattr(output, "last_hidden_state", None)
    if hidden is None and isinstance(output, tuple):
        hidden = output[0]
    if not isinstance(hidden, Tensor) or hidden.dim() != 3:
        raise MethodError(
            "gate xlora: the model's body gives no last hidden state (batch, tokens, width)",
            "use a gate that looks at each module's own input: arrow, meteora, smora",
        )
    return hidden


def _device(body: nn.Module) -> torch.device:
    return next(body.parameters()).device
