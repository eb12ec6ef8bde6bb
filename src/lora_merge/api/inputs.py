"""What functions of mixtures take: mixtures, base models and texts, as the caller has them.

A base is a directory, a Hub id, or a loaded model, which needs its tokenizer for texts. Data is a
file of JSON lines, or rows that were read from one.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from torch import nn

from lora_merge.errors import MethodError
from lora_merge.mixture.mixture import Mixture
from lora_merge.mixture.training.base_model import load_base
from lora_merge.mixture.training.data import Example, read_examples

Base: TypeAlias = str | os.PathLike[str] | nn.Module
Data: TypeAlias = str | os.PathLike[str] | Sequence[Example]
MixtureLike: TypeAlias = Mixture | str | os.PathLike[str]


def opened_mixture(mixture: MixtureLike) -> Mixture:
    """A mixture, opened if it is a directory or a Hub id."""
    if isinstance(mixture, Mixture):
        return mixture
    return Mixture.from_pretrained(os.fspath(mixture))


def loaded_base(base: Base, tokenizer: Any, device: str) -> tuple[Any, Any]:
    """(model, tokenizer) of a base, loaded if it is a directory or a Hub id."""
    if isinstance(base, nn.Module):
        return base, tokenizer
    model, reader = load_base(os.fspath(base), device)
    return model, tokenizer or reader


def read_rows(
    data: Data, tokenizer: Any, mixture: Mixture, max_length: int, strict: bool = False
) -> Sequence[Example]:
    """The rows that can be used.

    Raises:
        MethodError: If texts are to be read without a tokenizer.
    """
    if not isinstance(data, str | os.PathLike):
        return data
    if tokenizer is None:
        raise MethodError("a loaded model cannot read texts", "give its tokenizer, too")
    found = read_examples(
        Path(data), tokenizer, experts=mixture.names, max_length=max_length, strict=strict
    )
    return found.examples
