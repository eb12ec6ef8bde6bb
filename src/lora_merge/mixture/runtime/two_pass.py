"""X-LoRA's gate: a classifier on the last hidden state of a first pass, exact with a KV cache.

Position t's weights depend on positions <= t of the base model alone, so two caches make it exact:
one of the first pass, one of the mixed pass. The first pass skips every expert and the LM head.
"""

import contextlib
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_merge.errors import MethodError
from lora_merge.kernels import gated_stack
from lora_merge.mixture.gates.gate import GateSpec
from lora_merge.mixture.gates.memory import REMEMBERED, remember
from lora_merge.mixture.runtime.call.generation import STATE_IN_MODULES
from lora_merge.mixture.runtime.call.kv_state import CACHE_NAMES
from lora_merge.mixture.runtime.call.passes import Pass, Stage
from lora_merge.mixture.runtime.precision import kept_precise

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

    def _apply(self, fn: Any, recurse: bool = True) -> "HiddenGate":
        """Follow the model to other devices, and to no half precision."""
        with contextlib.ExitStack() as stack:
            for layer in self.linears:
                stack.enter_context(kept_precise(layer, "weight", "bias"))
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

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
        gate: The classifier.
    """

    def __init__(self, gate: HiddenGate) -> None:
        self.gate = gate

    def before(
        self, passed: Pass, body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Decide the weights of a pass that is about to enter the body."""
        if torch.is_grad_enabled():
            _refuse_reentrant(body)
        stage = passed.stage
        if stage is None or stage.tokens is None:
            raise MethodError(
                f"gate {passed.gate.spec.preset}: the call's arguments do not tell its tokens",
                "name input_ids or inputs_embeds",
            )
        passed.weights = self._weights(passed, stage, body, args, kwargs)

    def after(self, passed: Pass, stage: Stage, output: Any) -> None:
        """Remember what a lagged gate looks at."""
        if passed.gate.lagged and stage.companion is not None:
            stage.companion.rows[_HIDDEN] = _hidden_of(output)[:, -1:].detach()

    def _weights(
        self,
        passed: Pass,
        stage: Stage,
        body: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        companion, gate = stage.companion, passed.gate
        one = stage.tokens is not None and stage.tokens.length == 1
        if companion is not None and one and companion.rows:
            companion.steps += 1
            if gate.freeze_after is not None and companion.steps > gate.freeze_after:
                return companion.rows[_WEIGHTS]
            if gate.lagged and _HIDDEN in companion.rows:
                return self._decide(passed, stage, companion.rows[_HIDDEN])
        hidden = self._first_pass(passed, stage, body, args, kwargs)
        weights = self._decide(passed, stage, hidden)
        if companion is not None:
            companion.rows[_WEIGHTS] = weights.view(*hidden.shape[:2], -1)[:, -1]
        return weights

    def _decide(self, passed: Pass, stage: Stage, hidden: Tensor) -> Tensor:
        """Weights of all modules side by side, shape (T, N * C) or (T, C)."""
        spec, companion, tokens = passed.gate.spec, stage.companion, stage.tokens
        rows = self.gate(hidden)
        if spec.memory and tokens is not None:
            store = None if companion is None else companion.rows
            rows = remember(
                store, (REMEMBERED,), rows, spec.memory, tokens.counts, tokens.documents
            )
        scores = rows.view(rows.shape[0] * rows.shape[1], self.gate.num_scores, -1)
        weights = gated_stack.weights_of(scores, passed.gate.rule(scores.shape[-1]))
        if passed.gate.observe_hidden is not None and not passed.replay:
            everyone = tuple(range(weights.shape[-1]))
            for module in range(weights.shape[1]):
                passed.gate.observe_hidden(scores[:, module], weights[:, module], everyone)
        columns: Tensor = weights.flatten(1)
        return columns

    @torch.no_grad()
    def _first_pass(
        self,
        passed: Pass,
        stage: Stage,
        body: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Hidden states of the base model (or, not bypassed, of the even mixture)."""
        if stage.companion is not None:
            name = next(n for n in CACHE_NAMES if kwargs.get(n) is not None)
            kwargs = {**kwargs, name: stage.companion.twin}
        if kwargs.get("output_attentions"):
            kwargs = {**kwargs, "output_attentions": False}
        passed.bypass = passed.gate.spec.bypass
        if not passed.bypass:
            passed.weights = self.even_weights()
        try:
            return _hidden_of(body.forward(*args, **kwargs))
        finally:
            passed.bypass, passed.weights = False, None

    def even_weights(self) -> Tensor:
        """The same weight for every expert, shape (1, N * n)."""
        last = self.gate.linears[-1]
        share = self.gate.num_scores / last.out_features
        return torch.full((1, last.out_features), share, device=last.weight.device)


def hidden_states(body: nn.Module, **inputs: Any) -> Tensor:
    """Last hidden states of a body, shape (B, S, width), whatever it calls them."""
    return _hidden_of(body(**inputs))


def refuse_two_sequences(model: nn.Module, preset: str = "xlora") -> None:
    """An encoder and its decoder see different tokens; X-LoRA is defined on one sequence.

    Args:
        model: The model.
        preset: What the gate is called.

    Raises:
        MethodError: If the model has both, or has room for the state of one pass only.
    """
    if getattr(getattr(model, "config", None), "model_type", None) in STATE_IN_MODULES:
        raise MethodError(
            f"gate {preset}: {type(model).__name__} keeps the state of a text in its modules, and "
            "two passes would overwrite each other's",
            "use a gate that looks at each module's own input: arrow, spectr, meteora, smora",
        )
    if "decoder_input_ids" in inspect.signature(model.forward).parameters:
        raise MethodError(
            f"gate {preset}: {type(model).__name__} has an encoder and a decoder, with tokens "
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
