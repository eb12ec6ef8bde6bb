"""Which tokens a call of a model holds, read from its arguments."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from lora_merge.errors import MethodError

_IDS = ("input_ids", "decoder_input_ids")
_EMBEDS = ("inputs_embeds", "decoder_inputs_embeds")
_KEPT = ("logits_to_keep", "num_logits_to_keep")
_ENCODED = ("encoder_hidden_states", "encoder_attention_mask")
PACKED_BY_SCHEDULER = ("read_index", "write_index", "block_table")  # transformers' generate_batch


@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens of a call, or of a part of the model that has tokens of its own.

    Attributes:
        rows: Sequences, B.
        length: Tokens of each, S; None where there is no one sequence (images).
        counts: Which are no padding, bool, shape (B, S); None for all.
        documents: Number of the packed document of each token, int64, shape (B, S); None for one
            document per row.
        encoded: Hidden states of an encoder, and its tokens, if the modules may read those.
        kept: Tokens whose logits are wanted: the last so many (0: all), or their places.
        whole: Hidden states of all tokens, of which a head may see the kept ones only.
    """

    rows: int
    length: int | None
    counts: Tensor | None = None
    documents: Tensor | None = None
    encoded: "tuple[Tensor, Tokens] | None" = None
    kept: int | Tensor | None = None
    whole: Tensor | None = None

    def read_by(self, x: Tensor, *, ids: bool = False, cross: bool = False) -> "Tokens | None":
        """The tokens that a module's input holds, row by row; None if that cannot be known.

        Args:
            x: The input, (B, S, d), flattened (B S, d), of one vector per row (B, d), or an
                encoder's hidden states.
            ids: Whether it is token ids instead.
            cross: Whether the module reads what an encoder made, in whatever copy.
        """
        lead = tuple(x.shape if ids else x.shape[:-1])
        if self.encoded is not None:
            states, tokens = self.encoded
            if x is states or (cross and lead == states.shape[:-1]):
                return tokens
        if self.length is None:
            alone = lead == (self.rows,) or (len(lead) > 1 and lead[0] == self.rows)
            return replace(self, length=x[..., :1].numel() // self.rows) if alone else None
        if lead in ((self.rows, self.length), (self.rows * self.length,)):
            return self
        return None

    def head_sees(self, x: Tensor) -> "tuple[Tokens, Tensor] | None":
        """The kept tokens and their places, if `x` is the hidden states of those alone."""
        if self.kept is None or self.length is None or x.dim() != 3:
            return None
        places = torch.arange(self.length, device=x.device)
        if isinstance(self.kept, Tensor):
            places = places[self.kept.to(x.device)]
        elif self.kept:
            places = places[-self.kept :]
        if tuple(x.shape[:2]) != (self.rows, len(places)):
            return None
        counts = None if self.counts is None else self.counts[:, places.to(self.counts.device)]
        return Tokens(self.rows, len(places), counts), places


def read_tokens(
    given: Mapping[str, Any], past: int, *, masks: bool, kept: bool = True
) -> Tokens | None:
    """The tokens of a call.

    Args:
        given: Its arguments by name, in the order of the signature.
        past: Tokens that the KV cache holds already.
        masks: Whether padding and documents matter.
        kept: Whether a head may follow.

    Raises:
        MethodError: If they matter and the arguments do not tell.
    """
    lead = _shape(given)
    if lead is None:
        return None
    rows, length = lead
    wanted = next((given[n] for n in _KEPT if given.get(n) is not None), None) if kept else None
    tokens = Tokens(rows, length, kept=wanted)
    if masks and length is not None:
        mask = given.get("attention_mask")
        counts = _counts(mask, rows, length, past)
        tokens = replace(tokens, counts=counts, documents=_documents(given, counts, past, tokens))
    states, mask = (given.get(name) for name in _ENCODED)
    if isinstance(states, Tensor) and states.dim() == 3:
        other = states.shape[1]
        counts = _counts(mask, states.shape[0], other, 0) if masks else None
        tokens = replace(tokens, encoded=(states, Tokens(states.shape[0], other, counts)))
    return tokens


def _shape(given: Mapping[str, Any]) -> tuple[int, int | None] | None:
    """Rows and length of a call."""
    for names, dims in ((_EMBEDS, 3), (_IDS, 2)):
        for name in names:
            value = given.get(name)
            if isinstance(value, Tensor) and value.dim() == dims:
                return value.shape[0], value.shape[1]
    for name, value in given.items():
        if isinstance(value, Tensor) and value.dim() and "mask" not in name:
            if value.dim() == 2 and not value.is_floating_point():
                return value.shape[0], value.shape[1]
            return value.shape[0], None
    return None


def _counts(mask: Any, rows: int, length: int, past: int) -> Tensor | None:
    """Which tokens are no padding, from a mask of any kind, bool, shape (rows, length)."""
    if isinstance(mask, Mapping):  # one mask for each kind of layer
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if mask is None:
        return None
    if isinstance(mask, Tensor) and mask.dim() == 3:
        mask = mask[:, None]
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4) or mask.shape[-1] < length:
        raise MethodError(
            f"the gate has to know which tokens are padding, and the attention mask is "
            f"{_described(mask)}",
            f"give an attention mask of shape (rows, tokens), here ({rows}, {past + length})",
        )
    if mask.dim() == 2:
        return mask[:, -length:].bool()
    return _attends(mask, length, past, back=0).expand(rows, -1)


def _attends(mask: Tensor, length: int, past: int, *, back: int) -> Tensor:
    """Whether each token attends to the one `back` places before it, bool, (rows, length - back).

    Args:
        mask: Shape (rows, heads, queries, keys): bool, or added to the scores.
        length: Tokens of the call.
        past: Tokens before them.
        back: 0 for the token itself, which only padding does not attend to.
    """
    one = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] > torch.finfo(mask.dtype).min / 2
    first = min(past, one.shape[-1] - length)  # keys that are gone, or are not there yet
    keys = torch.arange(length - back, device=one.device) + first
    if one.shape[1] == 1 and length > 1:  # the same for every query: an encoder's
        return one[:, 0, keys]
    queries = torch.arange(back, length, device=one.device)
    return one[:, queries, keys]


def _documents(
    given: Mapping[str, Any], counts: Tensor | None, past: int, tokens: Tokens
) -> Tensor | None:
    """Which document each token belongs to, where several are packed into one row."""
    rows, length = tokens.rows, tokens.length
    if length is None or length < 2:
        return None
    number = given.get("seq_idx")
    if isinstance(number, Tensor) and number.shape == (rows, length):
        return number.long()
    first = _begins(given, counts, past, rows, length)
    if first is None:
        return None
    if counts is not None:  # what follows padding goes on, or begins anyway
        first = first & counts[:, :-1].to(first.device) & counts[:, 1:].to(first.device)
    if not bool(first.any()):
        return None
    start = first.new_zeros(rows, 1)
    return torch.cat([start, first.expand(rows, -1)], dim=1).long().cumsum(1)


def _begins(
    given: Mapping[str, Any], counts: Tensor | None, past: int, rows: int, length: int
) -> Tensor | None:
    """Tokens 1.. that begin a document, bool, shape (rows or 1, length - 1), or None."""
    bounds = given.get("cu_seq_lens_q")
    if isinstance(bounds, Tensor):
        begins = torch.zeros(length + 1, dtype=torch.bool, device=bounds.device)
        begins[bounds.long().clamp(max=length)] = True
        return begins[None, 1:length]
    found = []
    places, mask = given.get("position_ids"), given.get("attention_mask")
    if isinstance(places, Tensor) and places.dim() == 2 and places.shape[1] == length:
        step = places.diff(dim=1)
        # As transformers reads them; with a mask or a cache, it does not look for documents.
        found.append(step != 1 if mask is None and not past else step < 1)
    if isinstance(mask, Mapping):
        mask = mask.get("full_attention")
    if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[2] == length:
        found.append(~_attends(mask, length, past, back=1))
    return reduce(torch.logical_or, found) if found else None


def _described(mask: Any) -> str:
    return f"a tensor of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else str(type(mask))
