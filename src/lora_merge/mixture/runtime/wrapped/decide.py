"""From scores to weights, where earlier tokens or a whole prompt have a say."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lora_merge.errors import MethodError
from lora_merge.kernels import gated_stack
from lora_merge.mixture.gates.memory import REMEMBERED, over_prompt, remember
from lora_merge.mixture.gates.weights import only_of
from lora_merge.mixture.runtime.call.modules import Modules
from lora_merge.mixture.runtime.call.passes import Pass, Stage
from lora_merge.mixture.runtime.call.tokens import Tokens

_DECIDED = "decided"


def decide(
    group: Modules,
    passed: Pass,
    seen: Tokens | None,
    x: Tensor,
    scores: Tensor,
    start: int,
    stop: int,
) -> tuple[Tensor, Tensor]:
    """Weights of members start..stop, which are alike (or one).

    Args:
        group: The modules.
        passed: The pass.
        seen: The tokens of their input, if the gate needs them and the pass knows.
        x: The input.
        scores: Of each token, shape (T, M, n).
        start: First member.
        stop: After the last.

    Returns:
        Weights (T', M, E), T' = T or one row per sequence; and the scores they are made of.

    Raises:
        MethodError: If the gate needs to know the tokens, and nobody does.
    """
    spec = passed.gate.spec
    if spec.memory or spec.sequence:
        if seen is None:
            whole = _whole(passed, x)
            if whole is not None:
                return _of_head(group, passed, *whole, start, stop)
            seen = _by_itself(group, passed, x, start)
        keys = group.names[start:stop]
        if spec.sequence:
            return _of_prompt(group, passed, seen, scores, keys, start, stop)
        scores = _remembered(passed, seen, scores, keys)
    return _weights(group, passed, scores, start, stop), scores


def _weights(group: Modules, passed: Pass, scores: Tensor, start: int, stop: int) -> Tensor:
    """Weights of the gated experts (or ranks) from scores (..., M, n)."""
    only = passed.gate.only
    rule = passed.gate.rule(scores.shape[-1])
    weights = gated_stack.weights_of(scores, rule, group.gate_bias(start, stop))
    if only is not None:
        only = only if passed.routed is None else passed.routed.of_rows(only)
        weights = only_of(weights, only, group.experts[start])
    return weights


def _remembered(passed: Pass, seen: Tokens, scores: Tensor, keys: Sequence[str]) -> Tensor:
    """Scores (T, M, n) with those of earlier tokens."""
    memory, store = passed.gate.spec.memory, _store(passed, seen)
    rows = scores.view(seen.rows, -1, *scores.shape[1:])
    parts = [
        remember(store, (REMEMBERED, key), rows[:, :, m], memory, seen.counts, seen.documents)
        for m, key in enumerate(keys)
    ]
    return torch.stack(parts, dim=2).view(scores.shape)


def _of_prompt(
    group: Modules,
    passed: Pass,
    seen: Tokens,
    scores: Tensor,
    keys: Sequence[str],
    start: int,
    stop: int,
) -> tuple[Tensor, Tensor]:
    """Weights that a prompt decides once, for itself and for all that follows."""
    store, stage = _store(passed, seen), passed.stage
    decided = [] if store is None else [store.get((_DECIDED, key)) for key in keys]
    known = [weights for weights in decided if weights is not None]
    prompt = check_prompt(keys[0], stage, seen, cached=store is not None, decided=bool(known))
    if known:
        return torch.stack(known, dim=1), scores
    rows = scores.view(seen.rows, -1, *scores.shape[1:])
    counts, documents = seen.counts, seen.documents
    if documents is None:
        scores = over_prompt(rows[:, :prompt], None if counts is None else counts[:, :prompt])
    else:
        scores = over_prompt(rows, counts, documents).flatten(0, 1)
    weights = _weights(group, passed, scores, start, stop)
    if store is not None:
        last = weights.view(seen.rows, -1, *weights.shape[1:])[:, -1].detach()
        for m, key in enumerate(keys):
            store[(_DECIDED, key)] = last[:, m]
    return weights, scores


def check_prompt(
    name: str, stage: Stage | None, seen: Tokens, *, cached: bool, decided: bool
) -> int | None:
    """Tokens of the prompt among those seen; None for all.

    Raises:
        MethodError: If the prompt comes in pieces, since the first would be decided without the
            others.
    """
    length = seen.length or 1
    told = None if stage is None or _is_encoded(stage, seen) else stage.prompt
    past = 0 if stage is None or not cached else stage.past
    going_on = past > 0 and (length > 1 if told is None else past < told)
    in_pieces = told is not None and cached and past + length < told
    if going_on or in_pieces or (past > 0 and not decided):
        raise MethodError(
            f"{name}: the gate decides once for a whole prompt, of which this call holds "
            f"{length} tokens and the KV cache {past} others",
            "give the prompt in one piece and an empty cache, or use a gate that decides per token",
        )
    return told


def _whole(passed: Pass, x: Tensor) -> tuple[Tensor, Tokens, Tensor] | None:
    """What a head would have seen of all tokens, if `x` is that of the kept ones."""
    current = None if passed.stage is None else passed.stage.current
    sees = None if current is None else current.head_sees(x)
    if current is None or sees is None or current.whole is None:
        return None
    places = sees[1]
    whole = current.whole
    same = whole.shape[-1] == x.shape[-1] and torch.equal(whole[:, places.to(whole.device)], x)
    return (whole, replace(current, kept=None, whole=None), places) if same else None


def _of_head(
    group: Modules,
    passed: Pass,
    whole: Tensor,
    tokens: Tokens,
    places: Tensor,
    start: int,
    stop: int,
) -> tuple[Tensor, Tensor]:
    """Weights of the kept tokens alone, after all tokens have had their say."""
    scores = group.scores_of(passed, whole, start, stop)
    weights, scores = decide(group, passed, tokens, whole, scores, start, stop)
    if len(weights) == tokens.rows:
        return weights, scores
    rows = weights.view(tokens.rows, -1, *weights.shape[1:])
    kept = scores.view(tokens.rows, -1, *scores.shape[1:])
    return rows[:, places].flatten(0, 1), kept[:, places].flatten(0, 1)


def _by_itself(group: Modules, passed: Pass, x: Tensor, start: int) -> Tokens:
    """The tokens of a module that is called by itself, which are those of its input."""
    if passed.stage is None and not passed.replay:
        several = x.dim() > (1 if group.form == "embedding" else 2)
        return Tokens(x.shape[0] if several else 1, None)
    raise MethodError(
        f"{group.names[start]}: an input of shape {tuple(x.shape)}, of which the "
        f"{passed.gate.spec.preset} gate cannot know how it holds the tokens of the call",
        "leave the module out, or use a gate that decides each token by itself",
    )


def _store(passed: Pass, seen: Tokens) -> dict[object, Tensor] | None:
    """Where decisions live on: the cache's companion, but not for what an encoder has read."""
    stage = passed.stage
    if stage is None or stage.companion is None or _is_encoded(stage, seen):
        return None
    return stage.companion.rows


def _is_encoded(stage: Stage, seen: Tokens) -> bool:
    current = stage.current
    return current is not None and current.encoded is not None and current.encoded[1] is seen
