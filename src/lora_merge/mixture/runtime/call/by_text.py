"""Experts chosen once per prompt, by what it says, before any module runs."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_merge.errors import MethodError
from lora_merge.kernels import gated_stack
from lora_merge.mixture.runtime.call.passes import Pass, Stage
from lora_merge.mixture.runtime.wrapped.decide import check_prompt

_DECIDED = ("decided", "the whole model")


class ByText:
    """Runs before every pass of the model's body, and costs one mean over its tokens."""

    @torch.no_grad()
    def before(
        self, passed: Pass, body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Decide the weights of a pass that is about to enter the body."""
        stage = passed.stage
        if stage is None or stage.tokens is None or stage.tokens.length is None:
            raise MethodError(
                f"gate {passed.gate.spec.preset}: the call's arguments do not tell its tokens",
                "name input_ids or inputs_embeds",
            )
        store = None if stage.companion is None else stage.companion.rows
        known = None if store is None else store.get(_DECIDED)
        cached, decided = store is not None, known is not None
        prompt = check_prompt("prompt", stage, stage.tokens, cached=cached, decided=decided)
        if known is None:
            known = self._decide(passed, stage, prompt, body, args, kwargs)
            if store is not None:
                store[_DECIDED] = known.view(stage.tokens.rows, -1, known.shape[-1])[:, -1]
        _run_alone(passed, known)

    def after(self, passed: Pass, stage: Stage, output: Any) -> None:
        """Nothing is learned from what comes out."""

    def _decide(
        self,
        passed: Pass,
        stage: Stage,
        prompt: int | None,
        body: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Tensor:
        """Weights (B, E); of packed documents (B S, E)."""
        bank, tokens = passed.gate.bank, stage.tokens
        assert bank is not None and tokens is not None
        passed.bypass = True  # the embeddings may be adapted; what is compared is the base's
        try:
            states = token_states(body, args, kwargs)
        finally:
            passed.bypass = False
        counts, documents = tokens.counts, tokens.documents
        if documents is None:
            states, counts = states[:, :prompt], None if counts is None else counts[:, :prompt]
        scores = bank.index(states, counts, documents).flatten(0, -2)
        rule = passed.gate.rule(scores.shape[-1])
        return gated_stack.weights_of(scores[:, None], rule)[:, 0]


def token_states(body: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """What the model's layers read of a call's tokens, shape (B, S, d)."""
    states = kwargs.get("inputs_embeds")
    if isinstance(states, Tensor):
        return states
    ids = kwargs.get("input_ids", args[0] if args else None)
    if not isinstance(ids, Tensor) or ids.is_floating_point():
        raise MethodError("a gate by text needs a text", "name input_ids or inputs_embeds")
    embedded: Tensor = body.get_input_embeddings()(ids)
    return embedded


@torch.no_grad()
def vectors_of(body: Any, texts: Iterable[Tensor]) -> Tensor:
    """Mean token embedding of each text, float32 on the CPU, shape (n, d).

    Args:
        body: The model.
        texts: Token ids of each.
    """
    device = body.get_input_embeddings().weight.device
    device = torch.device("cpu") if device.type == "meta" else device
    rows = [
        token_states(body, (), {"input_ids": ids[None].to(device)})[0].float().mean(0).cpu()
        for ids in texts
    ]
    return torch.stack(rows)


def _run_alone(passed: Pass, weights: Tensor) -> None:
    """Have a pass run the experts that act and no others, where it is worth it."""
    passed.weights, bank = weights, passed.gate.bank
    if bank is None or passed.gate.observe is not None or not bank.may_narrow(1):
        return
    active = tuple(weights.any(0).nonzero().flatten().tolist())
    narrow = bank.alone(active)
    if narrow is not None:
        passed.gate = replace(passed.gate, bank=narrow, _rules={})
        passed.weights = weights[:, list(active)]
