"""Load the base model that a mixture runs in, and run rows through it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch

from lora_merge.adapters.access.live_modules import is_conv1d, linear_shape
from lora_merge.errors import LoraMergeError, SourceError
from lora_merge.files.hub import download
from lora_merge.files.inputs import note_input
from lora_merge.machine.device import pick_device
from lora_merge.mixture.insight.usage import Usage
from lora_merge.mixture.runtime.attach import AttachedMixture
from lora_merge.mixture.training.data import Example, in_order


def load_base(base: str, device: str = "auto", *, head: bool = False) -> tuple[Any, Any]:
    """(model, tokenizer) of a causal language model, or of a classifier.

    Args:
        base: A directory or a Hub id.
        device: "auto", "cpu", "cuda", ...
        head: Load it with its classification head instead of its language model's.

    Raises:
        LoraMergeError: If transformers is not installed.
        SourceError: If there is no such model.
    """
    place = pick_device(device)
    if Path(base).is_dir():
        note_input(base)
    with _told(base):
        from transformers import (
            AutoModelForCausalLM,
            AutoModelForSequenceClassification,
            AutoTokenizer,
        )
        from transformers.utils import logging

        logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        tokenizer = AutoTokenizer.from_pretrained(base)
        kind: Any = AutoModelForSequenceClassification if head else AutoModelForCausalLM
        model: Any = kind.from_pretrained(base)
        if place.type == "cpu" and model.dtype == torch.float16:
            model = model.float()  # CPUs have no arithmetic in half precision
        model = model.to(place)
    return model.eval(), tokenizer


def layer_order(base: str, mixture_modules: Sequence[str]) -> list[str]:
    """The order in which PEFT walks a model's modules; builds the model without its weights.

    Args:
        base: Base model: directory or Hub id; only its config is read.
        mixture_modules: The modules that the experts adapt.

    Raises:
        LoraMergeError: If transformers is not installed.
        SourceError: If there is no such model.
    """
    with _told(base), torch.device("meta"):
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(base)
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    wanted = set(mixture_modules)
    return [name for name, _ in model.named_modules() if name in wanted]


def linear_modules(base: str) -> dict[str, tuple[int, int]]:
    """Linear modules of a model, without its heads: name -> (d_out, d_in).

    Builds the model without its weights. Heads are the output projection and whatever stands beside
    the body (a classifier): what PEFT's "all-linear" leaves out, too.

    Args:
        base: Base model: directory or Hub id; only its config is read.

    Raises:
        LoraMergeError: If transformers is not installed.
        SourceError: If there is no such model.
    """
    with _told(base), torch.device("meta"):
        import transformers

        config = transformers.AutoConfig.from_pretrained(base)
        kind = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)
        model: Any = (kind._from_config if kind else transformers.AutoModel.from_config)(config)
    prefix = getattr(model, "base_model_prefix", "")
    inside = f"{prefix}." if prefix and hasattr(model, prefix) else ""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return {
        name: shape
        for name, m in model.named_modules()
        if (isinstance(m, torch.nn.Linear) or is_conv1d(m)) and (shape := linear_shape(m))
        if m is not head and name.startswith(inside)
    }


@contextmanager
def _told(base: str) -> Iterator[None]:
    """What the Hub and transformers say of a base model, in a line."""
    if not Path(base).exists():
        # Asked for here first: transformers would repeat its questions for most of a minute.
        download(f"base model {base}", base, None, ["config.json"])
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise LoraMergeError(
            "a base model needs transformers", "pip install 'lora-merge[peft]'"
        ) from error
    except Exception as error:  # a damaged file makes transformers raise anything
        said = isinstance(error, OSError | ValueError | RuntimeError)
        text = str(error) if said else f"{type(error).__name__}: {error}"
        reason = shorten(text, 300, placeholder=" ...")
        raise SourceError(f"base model {base}: {reason}", "check its files") from error


def watch_rows(
    model: Any, handle: AttachedMixture, examples: Sequence[Example], batch_size: int
) -> Usage:
    """Run rows through a model and count what its mixture's gates decide."""
    with torch.no_grad(), handle.watch() as seen:
        for batch in in_order(examples, batch_size):
            on = batch.to(handle.device)
            model(input_ids=on.ids, attention_mask=on.mask, use_cache=False)
    return seen
