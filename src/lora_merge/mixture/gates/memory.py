"""Scores that remember: what a text is shows over many tokens, and one token rarely tells.

s_t <- s_t + memory * s_(t-1). If a token's scores are its evidence, in nats, for each expert, this
is the posterior of a text that may change its expert at any token: evidence adds up, and what is
older than about 1 / (1 - memory) tokens is forgotten. Causal, so exact with a KV cache.
"""

from typing import Any

import torch
from torch import Tensor

REMEMBERED = "remembered"  # begins the keys of sums that are kept beside a KV cache
_CHUNK = 256  # tokens whose decay matrix is formed at once


def accumulate(
    scores: Tensor,
    memory: float,
    keep: Tensor | None = None,
    before: Tensor | None = None,
    documents: Tensor | None = None,
) -> Tensor:
    """Leaky sums of scores along a sequence.

    Args:
        scores: Shape (B, S, n).
        memory: Weight of the previous token's sum.
        keep: Tokens that count, bool, shape (B, S); padding adds nothing.
        before: Sums at the token before the first, shape (B, n); None for the start of a text.
        documents: Number of the text that each token belongs to, int64, shape (B, S), from 0 on and
            never falling, 0 going on from `before`; None for one text per row.

    Returns:
        Shape (B, S, n), float32 if `scores` is half precision; the last token's is the next
        call's `before`.
    """
    if scores.dtype in (torch.float16, torch.bfloat16):
        scores = scores.float()
    if keep is not None:
        scores = scores * keep[..., None].to(scores)
    parts, last = [], 0
    texts = [None] * -(-scores.shape[1] // _CHUNK)
    texts = texts if documents is None else documents.to(scores.device).split(_CHUNK, dim=1)
    for part, text in zip(scores.split(_CHUNK, dim=1), texts, strict=True):
        size = part.shape[1]
        steps = torch.arange(size, device=scores.device)
        age = steps[:, None] - steps
        decay = torch.where(age >= 0, memory ** age.clamp_min(0).to(scores), 0.0)
        if text is not None:
            decay = decay * (text[:, :, None] == text[:, None, :])
        summed = decay @ part
        if before is not None:
            older = memory ** (steps + 1).to(scores)[:, None] * before[:, None]
            summed = summed + (older if text is None else older * (text == last)[..., None])
        parts.append(summed)
        before, last = summed[:, -1], 0 if text is None else text[:, -1:]
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


def evidence(sums: Tensor, memory: float) -> Tensor:
    """Each token's own scores from the sums that `accumulate` made of whole texts.

    Args:
        sums: Shape (B, S, n), from the first token on; padding, if any, comes last.
        memory: As for `accumulate`.
    """
    before = torch.cat([torch.zeros_like(sums[:, :1]), sums[:, :-1]], dim=1)
    return sums - memory * before


def remember(
    store: dict[Any, Tensor] | None,
    key: tuple[Any, ...],
    scores: Tensor,
    memory: float,
    keep: Tensor | None,
    documents: Tensor | None = None,
) -> Tensor:
    """`accumulate`, going on from what the store holds under the key, which is brought up to date.

    Args:
        store: Rows that live as long as a KV cache, or None.
        key: Of this gate, `REMEMBERED` first.
        scores: Shape (B, S, n).
        memory: As for `accumulate`.
        keep: The same.
        documents: The same.
    """
    before = None if store is None else store.get(key)
    scores = accumulate(scores, memory, keep, before, documents)
    if store is not None:
        store[key] = scores[:, -1].detach()
    return scores


def over_prompt(scores: Tensor, counts: Tensor | None, documents: Tensor | None = None) -> Tensor:
    """Mean of the scores over the tokens that count.

    Args:
        scores: Shape (B, S, M, n).
        counts: Which tokens count, bool, shape (B, S); None for all.
        documents: Number of the text that each token belongs to, int64, shape (B, S), from 0 on.

    Returns:
        Shape (B, M, n); with documents that of each token's own, (B, S, M, n).
    """
    if counts is None and documents is None:
        return scores.mean(dim=1)
    shape = scores.shape[:2]
    keep = torch.ones(shape).to(scores) if counts is None else counts.to(scores)
    if documents is None:
        total = (scores * keep[..., None, None]).sum(dim=1)
        return total / keep.sum(dim=1)[:, None, None].clamp_min(1)
    documents = documents.to(scores.device)
    one = torch.nn.functional.one_hot(documents).to(scores) * keep[..., None]  # (B, S, D)
    total = torch.einsum("bsd,bsmn->bdmn", one, scores)
    means = total / one.sum(dim=1)[..., None, None].clamp_min(1)
    index = documents[..., None, None].expand(*shape, *scores.shape[2:])
    return means.gather(1, index)
