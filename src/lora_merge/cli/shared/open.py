"""Open the adapters a command line names."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from lora_merge.adapters.adapter import Adapter


def check_out(out: Path, *inputs: str | Path | None, force: bool) -> None:
    """Refuse an output directory before anything is read, measured or downloaded."""
    from lora_merge.adapters.references import expand
    from lora_merge.files.targets import check_target

    named = [Path(ref).expanduser() for ref in expand([str(i) for i in inputs if i is not None])]
    check_target(out, force=force, inputs=[path for path in named if path.exists()])


def open_all(refs: Sequence[str], **options: Any) -> "list[Adapter]":
    """Open every reference, with `open_options`; patterns stand for what they match."""
    from lora_merge.adapters.access.coerce import open_adapters

    return open_adapters(refs, **options)


def open_single(ref: str, **options: Any) -> "Adapter":
    """Open the one adapter that a reference stands for, with `open_options`."""
    opened = open_all([ref], **options)
    if len(opened) != 1:
        raise click.UsageError(f"{ref} stands for {len(opened)} adapters; name one")
    return opened[0]
