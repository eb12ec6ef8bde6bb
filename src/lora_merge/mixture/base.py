"""Load the base model that a mixture runs in, and run rows through it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lora_merge.errors import LoraMergeError, SourceError
from lora_merge.mixture.attach import AttachedMixture
from lora_merge.mixture.data import Example, in_order
from lora_merge.mixture.usage import Usage


def load_base(base: str, device: str = "auto") -> tuple[Any, Any]:
    """(model, tokenizer) of a causal language model.

    Args:
        base: A directory or a Hub id.
        device: "auto", "cpu", "cuda", ...

    Raises:
        LoraMergeError: If transformers is not installed.
        SourceError: If there is no such model.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        raise LoraMergeError(
            "running a model needs transformers", "pip install 'lora-merge[peft]'"
        ) from error
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        tokenizer = AutoTokenizer.from_pretrained(base)
        model: Any = AutoModelForCausalLM.from_pretrained(base)
        model = model.to(torch.device(device))
    except (OSError, ValueError, RuntimeError) as error:
        remedy = (
            "check the files"
            if Path(base).exists()
            else "check the path, the spelling and HF_TOKEN"
        )
        reason = str(error).strip().splitlines()[0]
        raise SourceError(f"base model {base}: {reason}", remedy) from error
    return model.eval(), tokenizer


def watch_rows(
    model: Any, handle: AttachedMixture, examples: Sequence[Example], batch_size: int
) -> Usage:
    """Run rows through a model and count what its mixture's gates decide."""
    with torch.no_grad(), handle.watch() as seen:
        for batch in in_order(examples, batch_size):
            on = batch.to(handle.device)
            model(input_ids=on.ids, attention_mask=on.mask, use_cache=False)
    return seen
