"""Open the adapters a command line names."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_merge.adapters import Adapter


def check_out(out: Path, *inputs: str | Path, force: bool) -> None:
    """Refuse an output directory before anything is read, measured or downloaded."""
    from lora_merge.adapters import check_target

    check_target(out, force=force, inputs=[Path(i) for i in inputs if Path(i).exists()])


def open_all(
    refs: Sequence[str], *, alpha: float | None, rslora: bool, allow_pickle: bool
) -> "list[Adapter]":
    """Open every reference; patterns stand for what they match."""
    from lora_merge.adapters import expand

    return [
        open_one(ref, alpha=alpha, rslora=rslora, allow_pickle=allow_pickle) for ref in expand(refs)
    ]


def open_one(ref: str, *, alpha: float | None, rslora: bool, allow_pickle: bool) -> "Adapter":
    """Open one reference; `open_options` takes what else there is to say of it."""
    from lora_merge.adapters import AdapterConfig, open_adapter, resolve

    fallback = None
    if alpha is not None:
        fallback = AdapterConfig(r=None, lora_alpha=alpha, use_rslora=rslora)
    return open_adapter(resolve(ref, allow_pickle=allow_pickle), fallback=fallback)
