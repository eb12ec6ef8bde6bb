"""Whatever a caller has, as opened adapters: every public function takes them through here."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import nn

from lora_merge.adapters.access.live_peft import is_peft, live_names
from lora_merge.adapters.access.opening import OpenAdapter, OpenAdapters
from lora_merge.adapters.adapter import Adapter
from lora_merge.adapters.adapter import open_adapter as open_files
from lora_merge.adapters.base_weights import CheckpointBase
from lora_merge.adapters.config import AdapterConfig
from lora_merge.adapters.identity.rename import parse_renames, rename_all
from lora_merge.adapters.references import expand, resolve
from lora_merge.arguments import takes
from lora_merge.errors import SourceError
from lora_merge.files.checkpoint import open_checkpoint


@takes(OpenAdapters)
def open_adapters(given: OpenAdapters) -> list[Adapter]:
    """Open adapters: only headers and configs are read.

    Returns:
        The adapters, in the order given; a glob's matches in the order of their names.

    Raises:
        SourceError: If a reference leads nowhere, a glob matches nothing, or a value is none of
            the above.
        AdapterError: If a file is no adapter that can be taken apart.

    Examples:
        >>> import lora_merge
        >>> [a.name for a in lora_merge.open_adapters("examples/adapters/*")]
        ['examples/adapters/double', 'examples/adapters/reverse', 'examples/adapters/upper']
    """
    fallback = None
    if given.alpha is not None:
        fallback = AdapterConfig(r=None, lora_alpha=given.alpha, use_rslora=given.rslora)
    model = None if given.base is None else base_for(given.base, given.rename)
    adapters = given.adapters
    opened: list[Adapter] = []
    for one in [adapters] if isinstance(adapters, _SINGLE) else _listed(adapters):
        if isinstance(one, Adapter):
            opened.append(one)
        elif isinstance(one, str | os.PathLike):
            opened += [
                open_files(
                    resolve(ref, allow_pickle=given.allow_pickle),
                    fallback=fallback,
                    base=model,
                    rank=given.rank,
                )
                for ref in expand([os.fspath(one)])
            ]
        elif isinstance(one, nn.Module) and is_peft(one):
            opened += [Adapter.from_peft(one, name) for name in live_names(one)]
        else:
            raise SourceError(
                f"a {type(one).__name__} is no adapter",
                "give a path, a glob, a Hub reference, an Adapter or a live PeftModel",
            )
    return rename_all(opened, given.rename)


@takes(OpenAdapter)
def open_adapter(given: OpenAdapter) -> Adapter:
    """Open one adapter; exactly one may be meant.

    Raises:
        SourceError: If it leads nowhere, or stands for several adapters.
        AdapterError: If it is no adapter that can be taken apart.

    Examples:
        >>> import lora_merge
        >>> lora_merge.open_adapter("examples/adapters/upper")
        Adapter examples/adapters/upper
          base model  examples/base
          modules     14, rank 8
          parameters  18,944, F16
    """
    opened = open_adapters(given.adapter, rank=given.rank, **given.opening)
    if len(opened) != 1:
        names = ", ".join(one.name for one in opened[:4]) or "none"
        raise SourceError(
            f"one adapter is wanted, not {len(opened)} ({names})",
            "name one; open_adapters opens several",
        )
    return opened[0]


def base_for(folder: str | os.PathLike[str], rename: Sequence[str] = ()) -> CheckpointBase:
    """A base model, in which adapters' modules are looked for under their new names."""
    changes = parse_renames(rename)

    def renamed(name: str) -> str:
        for change in changes:
            name = change.of(name)
        return name

    return CheckpointBase(open_checkpoint(Path(folder)), renamed)


_SINGLE = (Adapter, str, os.PathLike, nn.Module)


def _listed(adapters: object) -> list[object]:
    if isinstance(adapters, Iterable) and not isinstance(adapters, bytes | dict):
        return list(adapters)
    return [adapters]
