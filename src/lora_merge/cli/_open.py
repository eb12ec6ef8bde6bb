"""Open the adapters a command line names."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from lora_merge.cli._options import pickle_option, together

if TYPE_CHECKING:
    from lora_merge.adapters import Adapter

open_options = together(
    click.option("--alpha", type=float, help="lora_alpha of .safetensors files without a config."),
    click.option("--rslora", is_flag=True, help="Those files' scaling is alpha / sqrt(r)."),
    pickle_option,
)


def open_all(
    refs: Sequence[str], *, alpha: float | None, rslora: bool, allow_pickle: bool
) -> "list[Adapter]":
    """Open every reference; patterns stand for what they match."""
    from lora_merge.adapters import AdapterConfig, expand, open_adapter, resolve

    fallback = None
    if alpha is not None:
        fallback = AdapterConfig(r=None, lora_alpha=alpha, use_rslora=rslora)
    sources = [resolve(ref, allow_pickle=allow_pickle) for ref in expand(refs)]
    return [open_adapter(source, fallback=fallback) for source in sources]
