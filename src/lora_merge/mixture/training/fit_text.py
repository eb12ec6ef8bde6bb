"""What each expert's texts say, for gates that choose by the prompt: one look at the rows."""

from collections.abc import Sequence

import torch
from torch import nn

from lora_merge.mixture.gates.text_index import text_gate
from lora_merge.mixture.mixture import Mixture
from lora_merge.mixture.runtime.call.by_text import vectors_of
from lora_merge.mixture.runtime.call.hooks import body_of
from lora_merge.mixture.training.data import DataError, Example


def fit_to_texts(model: nn.Module, mixture: Mixture, examples: Sequence[Example]) -> Mixture:
    """Fit a gate by text, in closed form: means of the rows that name their expert.

    Of a row with a prompt only that counts, since that is what the gate will see.

    Args:
        model: Base model without an active mixture.
        mixture: Where to start; it stays as it is.
        examples: Rows that name their expert.

    Raises:
        DataError: If an expert has no rows.
    """
    body, texts = body_of(model), []
    for index, name in enumerate(mixture.names):
        rows = [torch.tensor(ids) for e in examples for ids in _texts_of(e, index)]
        if not rows:
            raise DataError(f"no row names {name}", 'add rows with its name as their "expert"')
        texts.append(vectors_of(body, rows))
    return mixture.with_gate(text_gate(texts), trained=True)


def _texts_of(example: Example, expert: int) -> list[tuple[int, ...]]:
    """What of a row is this expert's text."""
    if example.owners:
        pairs = zip(example.ids, example.owners, strict=True)
        own = tuple(token for token, owner in pairs if owner == expert)
        return [own] if own else []
    if example.expert != expert:
        return []
    return [example.ids[: example.skipped] or example.ids]
